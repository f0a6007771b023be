"""Reading a tensor from its file a block of rows at a time, and asking for it beforehand."""

from __future__ import annotations

import os
import weakref
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from loratool.storage.tensors import LazyTensor, TensorInfo, fill, is_range


class RowReader:
    """Rows of one tensor, through one buffer that every read uses again.

    Fresh memory for each block would cost more than reading it from the page cache, and opening
    the file for each about as much. The file is closed with the reader.
    """

    def __init__(self, tensor: LazyTensor, most_rows: int):
        """At most ``most_rows`` rows at a time."""
        self._tensor = tensor
        self._raw: memoryview | None = None
        if is_range(tensor) and tensor.nbytes and tensor.shape and tensor.dtype.torch is not None:
            raw = torch.empty(most_rows * self._row_bytes, dtype=torch.uint8, device="cpu")
            self._raw = raw.numpy().data
            self._rows = raw.view(tensor.dtype.torch).view(most_rows, *tensor.shape[1:])
            self._handle: int | None = None

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` on the CPU, valid until the next call. Raises MalformedFile."""
        info = self._tensor
        if self._raw is None or not isinstance(info, TensorInfo):
            return info.read_rows(start, stop)
        count, row_bytes = stop - start, self._row_bytes
        fill(
            self._open(info.path),
            info.path,
            info.offset + start * row_bytes,
            self._raw[: count * row_bytes],
            info.name,
        )
        return self._rows[:count]

    def _open(self, path: Path) -> int:
        if self._handle is None:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._handle)
        return self._handle

    @cached_property
    def _row_bytes(self) -> int:
        assert isinstance(self._tensor, TensorInfo)
        return self._tensor.nbytes // self._tensor.rows


def read_ahead(tensor: LazyTensor) -> None:
    """Ask the system to bring a tensor's bytes into the page cache, without waiting for it.

    A hint: where the system has no such call, or the file is not there, nothing happens.
    """
    if not isinstance(tensor, TensorInfo) or not hasattr(os, "posix_fadvise"):
        return
    try:
        handle = os.open(tensor.path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(handle, tensor.offset, tensor.nbytes, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
    finally:
        os.close(handle)
