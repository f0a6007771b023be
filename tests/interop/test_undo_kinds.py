"""Every kind of PEFT adapter: merged, verified, swapped and undone to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.ops.verify_report import EXACT
from tests.interop.test_peft_kinds import KINDS, pytestmark, randomised
from tests.ops.test_unmerge import bytes_of

__all__ = ["pytestmark"]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "fp32", "fp16"]
)
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
