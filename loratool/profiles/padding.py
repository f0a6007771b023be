"""Factors with a higher rank than their values need, made when read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.random import gaussian
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor


@dataclass(frozen=True)
class PaddedColumns:
    """B (out, r) with ``extra`` columns of zeros."""

    source: LazyTensor
    extra: int

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0], self.source.shape[1] + self.extra)

    def read(self) -> Tensor:
        return self._padded(self.source.read())

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self._padded(self.source.read_rows(start, stop))

    def _padded(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, self.extra))


@dataclass(frozen=True)
class PaddedRows:
    """A (r, in) with ``extra`` Gaussian rows of variance 1/in, a function of ``key``."""

    source: LazyTensor
    extra: int
    key: str

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.source.shape[0] + self.extra, self.source.shape[1])

    def read(self) -> Tensor:
        rows = self.source.read()
        width = rows.shape[1]
        noise = gaussian(self.extra, width, f"{self.key}:padding") / math.sqrt(width)
        return torch.cat([rows, noise.to(rows.dtype)])

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]
