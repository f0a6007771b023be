"""Rows through one buffer are those that a plain read gives; asking ahead changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loratool.errors import MalformedFile
from loratool.storage.checkpoint import open_checkpoint
from loratool.storage.row_reader import RowReader, read_ahead
from loratool.storage.tensors import MemoryTensor


@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_blocks_of_any_size_join_to_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, data: st.DataObject
) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    step = data.draw(st.integers(1, 10))
    value = torch.arange(rows * columns).reshape(rows, columns).to(dtype)
    file = tmp_path_factory.mktemp("rows") / "model.safetensors"
    save_file({"before": torch.ones(3), "x": value}, file)
    info = open_checkpoint(file).tensors["x"]
    read = RowReader(info, step)
    read_ahead(info)
    blocks = [read(i, min(i + step, rows)).clone() for i in range(0, rows, step)]
    assert torch.equal(torch.cat(blocks), value)


def test_other_tensors_are_read_as_they_read_themselves() -> None:
    value = torch.randn(6, 3)
    assert torch.equal(RowReader(MemoryTensor(value), 2)(2, 4), value[2:4])
    read_ahead(MemoryTensor(value))


def test_a_file_that_is_gone_or_short(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(8, 4)}, file)
    info = open_checkpoint(file).tensors["x"]
    read_ahead(replace(info, path=tmp_path / "gone"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(MalformedFile, match="ends in the middle of x"):
        RowReader(info, 8)(0, 8)
