"""Whatever the architecture: what extract writes, PEFT and transformers read as loratool does."""

from __future__ import annotations

import warnings
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import loratool as lt
from loratool.errors import Unplaced
from tests.interop.families import FAMILIES, Family

# transformers and PEFT on tied heads: they are meant to come apart, or are stored under both names
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings",
    "ignore:.*no longer tied",
)


def save_pair(family: Family, folder: Path, *, raw: bool = False) -> tuple[Path, Path]:
    """Base and tuned, both with every parameter at random; ``raw``: those without a place too."""
    torch.manual_seed(3)
    model = family.make()
    _move(model, 0.1, set())
    model.save_pretrained(folder / "base")
    _move(model, 0.05, set() if raw else set(family.raw))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def _move(model: PreTrainedModel, size: float, still: set[str]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(fnmatch(name, glob) for glob in still):
                parameter += size * torch.randn(parameter.shape)


def load(family: Family, path: Path) -> PreTrainedModel:
    return type(family.make()).from_pretrained(path, dtype=torch.float32)


def under_peft(family: Family, base: Path, adapter: Path) -> PeftModel:
    """The base under the adapter, every key of which PEFT must have found a place for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(family, base), str(adapter))
    texts = [str(warning.message) for warning in caught]
    complaints = [text for text in texts if "adapter keys" in text or "inconsistency" in text]
    assert not complaints, complaints
    again = model.load_adapter(str(adapter), "default")
    assert not again.unexpected_keys, again.unexpected_keys
    return model


def answer(family: Family, model: PreTrainedModel | PeftModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return getattr(model(**family.inputs()), family.output).float()


@pytest.mark.parametrize("rank", ["3", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_and_merged_agree(name: str, rank: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    lt.extract(base, tuned, tmp_path / "adapter", rank=rank)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, merged, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(answer(family, load(family, base)), merged, rtol=0.02, atol=0.02)
    if rank == "full":
        torch.testing.assert_close(
            merged, answer(family, load(family, tuned)), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.raw])
def test_parameters_without_a_place_are_refused_by_name(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path, raw=True)
    with pytest.raises(Unplaced) as caught:
        lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    refused = [detail.split(" ")[0] for detail in caught.value.details]
    assert all(any(fnmatch(name, glob) for glob in family.raw) for name in refused)
    assert all(any(fnmatch(name, glob) for name in refused) for glob in family.raw)
    assert "--exclude" in (caught.value.hint or "")
    lt.extract(base, tuned, tmp_path / "adapter", rank=3, exclude=family.raw)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        answer(family, under_peft(family, base, tmp_path / "adapter")),
        answer(family, load(family, tmp_path / "merged")),
        rtol=1e-4,
        atol=2e-5,
    )


def test_modules_whose_names_end_like_a_saved_one(tmp_path: Path) -> None:
    """PEFT saves input_layernorm as well where the model's own norm is saved."""
    family = FAMILIES["llama bare"]
    base, tuned = save_pair(family, tmp_path)
    before, after = (load_file(side / "model.safetensors") for side in (base, tuned))
    layers = {name for name in before if "layernorm" in name}
    assert layers
    assert "norm.weight" in before
    after |= {name: before[name] for name in layers}
    save_file(after, tuned / "model.safetensors", {"format": "pt"})
    report = lt.extract(base, tuned, tmp_path / "adapter", rank="full")
    assert {row.name for row in report.rows if row.status == "unchanged"} == layers
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, answer(family, load(family, tuned)), rtol=1e-4, atol=2e-5)
