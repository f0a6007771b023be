"""Every kind of PEFT adapter: merged, verified, swapped and undone to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratool as lt
from loratool.ops.verify_report import EXACT
from tests.interop.families import EXPERT_FAMILIES
from tests.interop.test_peft_experts import TARGETS, trained
from tests.interop.test_peft_kinds import (
    CONVOLUTIONS,
    KINDS,
    Convolutions,
    pytestmark,
    randomised,
)
from tests.ops.test_unmerge import bytes_of

__all__ = ["pytestmark"]


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "fp32", "fp16"]
)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    torch.manual_seed(0)
    model = make().to(dtype)
    model.save_pretrained(tmp_path / "base")
    randomised(model, config).save_pretrained(tmp_path / "adapter")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    lt.merge(base, adapter, tmp_path / "merged", receipt=True)
    assert lt.verify(tmp_path / "merged", base, adapter).verdict == EXACT
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    swapped = lt.swap(tmp_path / "merged", adapter, adapter, tmp_path / "swapped")
    for path in (tmp_path / "merged").iterdir():
        assert (tmp_path / "swapped" / path.name).read_bytes() == path.read_bytes()
    assert swapped.facts["receipt"]["bytes"] > 0


@DTYPES
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kernels_come_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    names, config = CONVOLUTIONS[kind]
    config.target_modules = set(names)
    torch.manual_seed(0)
    model = Convolutions().to(dtype)
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    base, merged = (tmp_path / f"{name}.safetensors" for name in ("base", "merged"))
    save_file(state, base, {"format": "pt"})
    adapter = tmp_path / "adapter"
    randomised(model, config).save_pretrained(adapter)
    lt.merge(base, adapter, merged, receipt=True)
    assert lt.verify(merged, base, adapter).verdict == EXACT
    lt.unmerge(merged, adapter, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes() != merged.read_bytes()


@DTYPES
@pytest.mark.parametrize("targets", [TARGETS[0], TARGETS[-1]], ids=str)
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_experts_come_back(targets: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    torch.manual_seed(0)
    EXPERT_FAMILIES["mixtral"].make().to(dtype).save_pretrained(base)
    trained(adapter, targets)
    lt.merge(base, adapter, merged, receipt=True)
    assert lt.verify(merged, base, adapter).verdict == EXACT
    lt.unmerge(merged, adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
