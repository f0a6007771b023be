"""An extracted adapter under PEFT gives the logits of the checkpoint that loratool merges."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

import loratool as lt
from tests.interop.conftest import MODELS, Maker, logits, save_pair


def load(make: Maker, path: Path) -> PreTrainedModel:
    model_class = type(make())
    return model_class.from_pretrained(path, dtype=torch.float32)


def under_peft(make: Maker, base: Path, adapter: Path) -> PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(make, base), str(adapter))
    complaints = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    assert not complaints, complaints
    return model


@pytest.mark.parametrize("rank", ["4", "full"])
def test_peft_and_merged_agree(make: Maker, tmp_path: Path, rank: str) -> None:
    base, tuned = save_pair(make, tmp_path, torch.float32)
    lt.extract(base, tuned, tmp_path / "adapter", rank=rank)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    model = under_peft(make, base, tmp_path / "adapter")
    merged = logits(load(make, tmp_path / "merged"))
    assert torch.allclose(logits(model), merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load(make, base)), merged, rtol=1e-2, atol=1e-2)
    if rank == "full":
        assert torch.allclose(merged, logits(load(make, tuned)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_peft_merge_agrees(make: Maker, tmp_path: Path) -> None:
    """PEFT's own merge of our adapter is our merge, up to its rounding: nothing counted twice."""
    base, tuned = save_pair(make, tmp_path, torch.float32)
    lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    model = under_peft(make, base, tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(
        logits(model), logits(load(make, tmp_path / "merged")), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_bf16_pair(name: str, tmp_path: Path) -> None:
    """bf16 factors on a float32 copy of the base: PEFT's forward is ours to bf16's rounding."""
    base, tuned = save_pair(MODELS[name], tmp_path, torch.bfloat16)
    lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    peft = logits(under_peft(MODELS[name], base, tmp_path / "adapter"))
    merged = logits(load(MODELS[name], tmp_path / "merged"))
    assert torch.allclose(peft, merged, rtol=0.05, atol=0.03)


def test_drop_rest(tmp_path: Path) -> None:
    """--drop-rest leaves only low-rank factors, and PEFT still agrees with the merge."""
    base, tuned = save_pair(MODELS["gpt2"], tmp_path, torch.float32)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=4, drop_rest=True)
    assert report.left_out_share > 0.05
    adapter = lt.open_adapter(tmp_path / "adapter")
    assert not adapter.replacements
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    peft = logits(under_peft(MODELS["gpt2"], base, tmp_path / "adapter"))
    merged = logits(load(MODELS["gpt2"], tmp_path / "merged"))
    assert torch.allclose(peft, merged, rtol=1e-4, atol=1e-4)


def test_only_some_modules_changed(tmp_path: Path) -> None:
    """Names in the config cover exactly the modules that changed, layer by layer."""
    base, tuned = save_pair(MODELS["llama"], tmp_path, torch.float32)
    report = lt.extract(
        base, tuned, tmp_path / "adapter", rank=4, include=["layers.1.self_attn", "layers.0.mlp"]
    )
    assert {row.name.split(".")[2] for row in report.rows if row.rank} == {"0", "1"}
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    peft = logits(under_peft(MODELS["llama"], base, tmp_path / "adapter"))
    merged = logits(load(MODELS["llama"], tmp_path / "merged"))
    assert torch.allclose(peft, merged, rtol=1e-4, atol=1e-4)
