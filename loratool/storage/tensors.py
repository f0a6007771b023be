"""Tensors that lie in files: where each is, and how to read it, whole or by rows."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from loratool.errors import MalformedFile, UnsupportedInput, UsageError
from loratool.storage.dtypes import BY_TORCH, DType

_COMPARED_ELEMENTS = 2**22


class LazyTensor(Protocol):
    """A tensor with a known dtype and shape whose values are fetched when asked for."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Tensor:
        """All values, contiguous, on the CPU."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension; a scalar is its own only row."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor inside one file.

    ``offset`` and ``nbytes`` are in bytes from the start of the file. ``strides`` (in elements) is
    None for the usual row-major layout; torch pickles may hold transposed views.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def read(self) -> Tensor:
        """The tensor, contiguous, on the CPU. Raises MalformedFile when the file is short."""
        if self.strides is not None:
            flat = _read_elements(self, self.offset, self.nbytes)
            return flat.as_strided(self.shape, self.strides).contiguous()
        return _read_elements(self, self.offset, self.nbytes).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` (of a scalar, itself). Raises UsageError where there are none."""
        if not self.shape:
            return self.read()
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(f"{self.name}: has {self.shape[0]} rows, not {start}:{stop}")
        if self.strides is not None:
            return self.read()[start:stop]
        row_bytes = self.nbytes // self.shape[0] if self.shape[0] else 0
        flat = _read_elements(self, self.offset + start * row_bytes, (stop - start) * row_bytes)
        return flat.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor already in memory, with the interface of one in a file."""

    value: Tensor = field(repr=False)

    @property
    def dtype(self) -> DType:
        return BY_TORCH[self.value.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def read(self) -> Tensor:
        return self.value.contiguous()

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.value[start:stop].contiguous() if self.shape else self.value


def is_range(tensor: LazyTensor) -> TypeGuard[TensorInfo]:
    """Whether a tensor's bytes lie in a file as a file would hold them."""
    return isinstance(tensor, TensorInfo) and tensor.strides is None


def equal_values(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two tensors have one shape and the same numbers, read a part at a time."""
    if one.shape != two.shape:
        return False
    rows = one.shape[0] if one.shape else 1
    step = max(1, _COMPARED_ELEMENTS * rows // max(1, math.prod(one.shape)))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        left, right = one.read_rows(start, stop), two.read_rows(start, stop)
        if one.dtype != two.dtype:
            left, right = left.double(), right.double()
        if not torch.equal(left, right):
            return False
    return True


def _read_elements(info: TensorInfo, offset: int, nbytes: int) -> Tensor:
    if info.dtype.torch is None:
        raise UnsupportedInput(
            f"{info.path.name}: {info.name} is {info.dtype.name}, which loratool can only copy"
        )
    if nbytes == 0:
        return torch.empty(0, dtype=info.dtype.torch, device="cpu")
    raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    read_into(info.path, offset, raw.numpy().data, what=info.name)
    return raw.view(info.dtype.torch)


def read_into(path: Path, offset: int, buffer: memoryview, what: str) -> None:
    """Fill ``buffer`` from ``path`` at ``offset``; a short file is MalformedFile, not a crash."""
    with open(path, "rb", buffering=0) as file:
        fill(file.fileno(), path, offset, buffer, what)


def fill(handle: int, path: Path, offset: int, buffer: memoryview, what: str) -> None:
    """The same from a file that is open; ``path`` and ``what`` are for the error."""
    done = os.preadv(handle, [buffer], offset)
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise MalformedFile(
                f"{path}: ends in the middle of {what}",
                hint="the file is truncated or changed while it was read; fetch it again",
            )
        done += count
