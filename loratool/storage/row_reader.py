"""Reading a tensor from its file a block of rows at a time, and asking for it beforehand."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from loratool.storage.tensors import LazyTensor, TensorInfo, read_into


class RowReader:
    """Rows of one tensor, through one buffer that every read uses again.

    Fresh memory for each block would cost more than reading it from the page cache.
    """

    def __init__(self, tensor: LazyTensor, most_rows: int):
        """At most ``most_rows`` rows at a time."""
        self._tensor = tensor
        self._raw: Tensor | None = None
        is_plain = isinstance(tensor, TensorInfo) and tensor.strides is None and tensor.shape
        if is_plain and tensor.dtype.torch is not None:
            self._raw = torch.empty(most_rows * self._row_bytes, dtype=torch.uint8)

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` on the CPU, valid until the next call. Raises MalformedFile."""
        info = self._tensor
        if self._raw is None or not isinstance(info, TensorInfo):
            return info.read_rows(start, stop)
        raw = self._raw[: (stop - start) * self._row_bytes]
        read_into(info.path, info.offset + start * self._row_bytes, raw.numpy().data, info.name)
        assert info.dtype.torch is not None
        return raw.view(info.dtype.torch).view(stop - start, *info.shape[1:])

    @property
    def _row_bytes(self) -> int:
        assert isinstance(self._tensor, TensorInfo)
        rows = self._tensor.rows
        return self._tensor.nbytes // rows if rows else 0


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
