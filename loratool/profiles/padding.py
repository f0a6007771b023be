"""Factors with a higher rank than their values need, made when read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate
from loratool.algebra.random import gaussian
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor


@dataclass(frozen=True)
class PaddedColumns:
    """B (out, r), or (out, r, 1…) of a convolution, with ``extra`` columns of zeros."""

    source: LazyTensor
    extra: int

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, rank, *rest = self.source.shape
        return (rows, rank + self.extra, *rest)

    def read(self) -> Tensor:
        return self._padded(self.source.read())

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self._padded(self.source.read_rows(start, stop))

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (*(0,) * (2 * rows.ndim - 4), 0, self.extra))


@dataclass(frozen=True)
class PaddedRows:
    """A (r, in), or (r, in, k…), with ``extra`` Gaussian rows of variance 1/in, or 1/(in·k…).

    The numbers are a function of ``key``.
    """

    source: LazyTensor
    extra: int
    key: str

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rank, *rest = self.source.shape
        return (rank + self.extra, *rest)

    def read(self) -> Tensor:
        rows = self.source.read()
        width = math.prod(rows.shape[1:])
        noise = gaussian(self.extra, width, f"{self.key}:padding") / math.sqrt(width)
        return torch.cat([rows, noise.reshape(self.extra, *rows.shape[1:]).to(rows.dtype)])

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


def padded(update: LowRankUpdate, rank: int, key: str) -> LowRankUpdate:
    """The update at a higher rank: alpha is raised with it, so that the scale stays what it is."""
    extra = rank - update.rank
    if not extra:
        return update
    return replace(
        update,
        b=PaddedColumns(update.b, extra),
        a=PaddedRows(update.a, extra, key),
        alpha=update.scale * rank,
    )
