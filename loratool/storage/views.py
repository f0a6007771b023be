"""Parts and joins of stored tensors that read as tensors themselves, without a copy on disk.

Each is a LazyTensor with the sizes that a TensorInfo has: ``numel``, ``nbytes``, ``rows``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor, TensorInfo, is_range


class Stored(LazyTensor, Protocol):
    """A tensor, or a view of tensors, whose values lie in files."""

    @property
    def numel(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored."""

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""


@dataclass(frozen=True)
class _View(ABC):
    """What follows from dtype and shape."""

    @property
    @abstractmethod
    def dtype(self) -> DType: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.bits // 8

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def read(self) -> Tensor:
        return self.read_rows(0, self.rows)

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class _OfOne(_View):
    """A view of one tensor, in its dtype."""

    source: LazyTensor

    @property
    def dtype(self) -> DType:
        return self.source.dtype


@dataclass(frozen=True)
class Zeros(_View):
    """A tensor of zeros, stored nowhere."""

    kind: DType
    sizes: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return self.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sizes

    def read_rows(self, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, *self.sizes[1:], dtype=self.kind.torch, device="cpu")


@dataclass(frozen=True)
class _Rows(_OfOne):
    """Rows ``start:stop`` of a tensor."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.source.shape[1:])

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read_rows(self.start + start, self.start + stop)


@dataclass(frozen=True)
class _Member(_OfOne):
    """One entry of the first dimension."""

    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read_rows(self.index, self.index + 1)[0][start:stop]


@dataclass(frozen=True)
class Columns(_OfOne):
    """Every ``step``-th column of a matrix from ``start`` up to ``stop``."""

    start: int
    stop: int
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0], len(range(self.start, self.stop, self.step)))

    def read_rows(self, start: int, stop: int) -> Tensor:
        rows = self.source.read_rows(start, stop)
        return rows[:, self.start : self.stop : self.step].contiguous()


@dataclass(frozen=True)
class Joined(_View):
    """Tensors of one dtype one after the other, along the first dimension."""

    parts: tuple[LazyTensor, ...]

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def read_rows(self, start: int, stop: int) -> Tensor:
        pieces, before = [], 0
        for part in self.parts:
            first, last = max(start - before, 0), min(stop - before, part.shape[0])
            if first < last:
                pieces.append(part.read_rows(first, last))
            before += part.shape[0]
        return torch.cat(pieces) if pieces else self.parts[0].read_rows(0, 0)


@dataclass(frozen=True)
class Interleaved(_View):
    """Matrices of one shape, dtype and n of them: column k·n + i is column k of matrix i."""

    parts: tuple[LazyTensor, ...]

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.parts[0].shape
        return (rows, columns * len(self.parts))

    def read_rows(self, start: int, stop: int) -> Tensor:
        return torch.stack([part.read_rows(start, stop) for part in self.parts], dim=2).flatten(1)


@dataclass(frozen=True)
class Flattened(_OfOne):
    """All values of a tensor in one dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.source.shape),)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read().reshape(-1)[start:stop]


@dataclass(frozen=True)
class Reshaped(_OfOne):
    """The values of a tensor in their order, in another shape."""

    new_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.new_shape

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read().reshape(self.new_shape)[start:stop]


@dataclass(frozen=True)
class Transposed(_OfOne):
    """A matrix with rows and columns exchanged."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[::-1]

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read()[:, start:stop].T.contiguous()


@dataclass(frozen=True)
class Lengthened(_OfOne):
    """A tensor with rows of zeros behind its own."""

    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.source.shape[1:])

    def read_rows(self, start: int, stop: int) -> Tensor:
        end = self.source.shape[0]
        own = self.source.read_rows(min(start, end), min(stop, end))
        return torch.cat([own, own.new_zeros(stop - start - len(own), *self.shape[1:])])


def rows_of(source: LazyTensor, start: int, stop: int) -> Stored:
    """Rows ``start:stop``; of a plainly stored tensor a tensor of its own."""
    if is_range(source) and source.shape:
        row_bytes = source.nbytes // source.rows if source.rows else 0
        return replace(
            source,
            name=f"{source.name}[{start}:{stop}]",
            shape=(stop - start, *source.shape[1:]),
            offset=source.offset + start * row_bytes,
            nbytes=(stop - start) * row_bytes,
        )
    return _Rows(source, start, stop)


def member_of(source: LazyTensor, index: int) -> Stored:
    """``source[index]``; of a plainly stored tensor a tensor of its own."""
    row = rows_of(source, index, index + 1)
    if isinstance(row, TensorInfo):
        return replace(row, shape=source.shape[1:])
    return _Member(source, index)


def files_of(tensor: LazyTensor) -> set[Path]:
    """The files that the values lie in."""
    return {stored.path for stored in stored_in(tensor)}


def stored_in(tensor: LazyTensor) -> list[TensorInfo]:
    """The tensors of files that the values are of."""
    if isinstance(tensor, TensorInfo):
        return [tensor]
    sources: Iterable[LazyTensor] = ()
    if isinstance(tensor, _OfOne):
        sources = (tensor.source,)
    elif isinstance(tensor, Joined | Interleaved):
        sources = tensor.parts
    return [stored for source in sources for stored in stored_in(source)]
