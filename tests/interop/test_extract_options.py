"""Less common forms of adapters that extract writes: PEFT computes what loratool merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.interop.families import FAMILIES
from tests.interop.test_families import answer, load, save_pair, under_peft

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert masked"])
def test_continued_adapters(name: str, tmp_path: Path) -> None:
    """Linear, Conv1D and embeddings, from an adapter of another scale."""
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    lt.extract(base, tuned, tmp_path / "first", rank=2)
    config = tmp_path / "first" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 3'))
    lt.extract(base, tuned, tmp_path / "adapter", rank=3, into=tmp_path / "first")
    updates = lt.open_adapter(tmp_path / "adapter").low_rank
    assert {update.rank for update in updates.values()} == {5}
    assert {update.scale for update in updates.values()} == {1.5}
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, merged, **CLOSE)


@pytest.mark.parametrize("rank", ["3", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert classifier", "deberta-v2 convolution"])
def test_dora(name: str, rank: str, tmp_path: Path) -> None:
    """Linear, Conv1D, embeddings and convolutions with magnitudes."""
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    conv_rank = rank if name == "deberta-v2 convolution" else None
    report = lt.extract(base, tuned, tmp_path / "a", rank=rank, conv_rank=conv_rank, dora=True)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["use_dora"] is True
    assert {row.kind for row in report.rows if row.rank} >= (
        {"convolution", "linear"} if conv_rank else {"conv1d"} if name == "gpt2" else {"linear"}
    )
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    peft = answer(family, under_peft(family, base, tmp_path / "a"))
    torch.testing.assert_close(peft, merged, **CLOSE)
    if rank == "full":
        torch.testing.assert_close(merged, answer(family, load(family, tuned)), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*no longer tied")
@pytest.mark.filterwarnings("ignore:.* LoRA tensor.* have invalid shape. .*lora_B.bias")
@pytest.mark.parametrize("name", ["gpt2", "opt", "roberta classifier", "deberta-v2 convolution"])
def test_lora_bias(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    conv_rank = 3 if name == "deberta-v2 convolution" else None
    lt.extract(base, tuned, tmp_path / "a", rank=3, conv_rank=conv_rank, bias="lora_bias")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["lora_bias"], config["bias"]) == (True, "none")
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    model = under_peft(family, base, tmp_path / "a")
    torch.testing.assert_close(answer(family, model), merged, **CLOSE)
    torch.testing.assert_close(answer(family, model.merge_and_unload()), merged, **CLOSE)
