"""Views read what torch's indexing of the whole tensors gives, whole and by rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratool.storage.checkpoint import open_checkpoint
from loratool.storage.tensors import LazyTensor, MemoryTensor, TensorInfo
from loratool.storage.views import (
    Columns,
    Interleaved,
    Joined,
    Lengthened,
    Stored,
    files_of,
    member_of,
    rows_of,
)

VALUES = {
    "matrix": torch.arange(42, dtype=torch.float32).reshape(7, 6),
    "other": -torch.arange(42, dtype=torch.float32).reshape(7, 6),
    "stack": torch.arange(60, dtype=torch.bfloat16).reshape(3, 5, 4),
    "vector": torch.arange(9, dtype=torch.float32),
}
Tensors = dict[str, LazyTensor]


@pytest.fixture(params=["safetensors", "transposed in a pickle", "memory"])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> Tensors:
    if request.param == "memory":
        return {name: MemoryTensor(value) for name, value in VALUES.items()}
    if request.param == "safetensors":
        save_file(VALUES, tmp_path / "a.safetensors")
        return dict(open_checkpoint(tmp_path / "a.safetensors").tensors)
    turned = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in VALUES.items()
    }
    torch.save(turned, tmp_path / "a.bin")
    return dict(open_checkpoint(tmp_path / "a.bin").tensors)


CASES: list[tuple[Callable[[Tensors], Stored], Tensor]] = [
    (lambda t: rows_of(t["matrix"], 2, 5), VALUES["matrix"][2:5]),
    (lambda t: rows_of(t["vector"], 2, 5), VALUES["vector"][2:5]),
    (lambda t: rows_of(t["stack"], 1, 3), VALUES["stack"][1:3]),
    (lambda t: member_of(t["stack"], 1), VALUES["stack"][1]),
    (lambda t: rows_of(member_of(t["stack"], 2), 1, 4), VALUES["stack"][2, 1:4]),
    (lambda t: Columns(t["matrix"], 1, 6, 2), VALUES["matrix"][:, 1:6:2]),
    (
        lambda t: Joined((t["matrix"], rows_of(t["other"], 3, 4), t["other"])),
        torch.cat([VALUES["matrix"], VALUES["other"][3:4], VALUES["other"]]),
    ),
    (
        lambda t: Interleaved((t["matrix"], t["other"])),
        torch.stack([VALUES["matrix"], VALUES["other"]], dim=2).reshape(7, 12),
    ),
    (
        lambda t: Lengthened(t["matrix"], 9),
        torch.cat([VALUES["matrix"], torch.zeros(2, 6)]),
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_views_read_what_indexing_gives(case: int, tensors: Tensors) -> None:
    make, value = CASES[case]
    view = make(tensors)
    assert (view.shape, view.rows, view.numel) == (tuple(value.shape), len(value), value.numel())
    assert view.dtype.torch == value.dtype
    assert view.nbytes == value.numel() * value.element_size()
    assert torch.equal(view.read(), value)
    assert view.read().is_contiguous()
    for start in range(len(value) + 1):
        for stop in range(start, len(value) + 1):
            assert torch.equal(view.read_rows(start, stop), value[start:stop])


def test_a_part_of_a_plainly_stored_tensor_is_one_itself(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "a.safetensors")
    stored = open_checkpoint(tmp_path / "a.safetensors").tensors
    assert isinstance(rows_of(member_of(stored["stack"], 1), 2, 3), TensorInfo)


def test_views_know_their_files(tmp_path: Path) -> None:
    for name in ("matrix", "other"):
        save_file({name: VALUES[name]}, tmp_path / f"{name}.safetensors")
    one, two = (
        open_checkpoint(tmp_path / f"{name}.safetensors").tensors[name]
        for name in ("matrix", "other")
    )
    both = {tmp_path / "matrix.safetensors", tmp_path / "other.safetensors"}
    assert files_of(Columns(Joined((one, rows_of(two, 1, 2))), 0, 2)) == both
    assert files_of(Interleaved((one, two))) == both
    assert files_of(MemoryTensor(VALUES["matrix"])) == set()
