"""One pass over the values of tensors: what ails them, and which are equal."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.health import FAR, FAR_ROW, Health, HealthSums
from loratool.engine import Engine, Progress
from loratool.ops.deltas import matrix_shape
from loratool.plural import counted
from loratool.storage.dtypes import DType
from loratool.storage.row_reader import RowReader
from loratool.storage.tensors import LazyTensor

_BLOCK_ELEMENTS = 2**20

RULES = (
    f"outlier: a value over {FAR:g} times the tensor's RMS, or a row with over {FAR_ROW:g} times "
    "the median norm; saturated: at the largest value that the dtype has"
)


@dataclass(frozen=True)
class TensorValues:
    """One tensor's values. health: None of integers. digest: SHA-256 of shape, dtype and bytes,
    None of a dtype that can only be copied."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    health: Health | None
    digest: str | None

    def findings(self) -> list[str]:
        """What is worth knowing, in words, the worst first."""
        health = self.health
        if self.digest is None:
            return [f"not read: {self.dtype.name}"]
        if health is None:
            return []
        found = []
        if health.nan:
            found.append(f"{health.nan:,} NaN")
        if health.infinite:
            found.append(f"{health.infinite:,} infinite")
        if health.saturated:
            found.append(f"{health.saturated:,} saturated")
        if health.is_zero and health.elements:
            found.append("all zero")
        elif health.zero_rows:
            found.append(f"{health.zero_rows:,} of {counted(health.rows, 'row')} zero")
        if health.far is not None:
            found.append(f"outlier {health.far:.0f}× RMS at {self._index(health)}")
        if health.far_rows:
            found.append(f"{counted(health.far_rows, 'outlier row')}")
        return found

    def _index(self, health: Health) -> list[int] | None:
        """Where the largest value is; None where there is no value."""
        if not health.elements:
            return None
        row, column = health.at
        flat = row * matrix_shape(self.shape)[1] + column
        return [int(part) for part in np.unravel_index(flat, self.shape)]

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"name": self.name, "sha256": self.digest}
        if (health := self.health) is not None:
            body |= {
                "nan": health.nan,
                "infinite": health.infinite,
                "saturated": health.saturated,
                "zero_rows": health.zero_rows,
                "all_zero": health.is_zero,
                "largest": health.largest,
                "largest_at": self._index(health),
                "rms": health.rms,
                "outlier": health.far,
                "outlier_rows": health.far_rows,
            }
        return body | {"findings": self.findings()}


def all_well(values: Sequence[TensorValues]) -> str:
    """What to say where no tensor has findings; of integers nothing is looked at."""
    floats = sum(row.health is not None for row in values)
    read = f"all {counted(len(values), 'tensor')} read"
    if floats == len(values):
        return f"{read}: finite, no outliers, no dead rows"
    if not floats:
        return f"{read}: of integers, whose values are not judged"
    return f"{read}: the {floats:,} of floats are finite, without outliers and dead rows"


def read_values(
    tensors: Iterable[tuple[str, LazyTensor]], engine: Engine, progress: Progress
) -> tuple[TensorValues, ...]:
    """Read every tensor once, in blocks of rows. Raises MalformedFile for a file cut short."""
    return tuple(
        engine.map(
            _read,
            list(tensors),
            cost=lambda job: matrix_shape(job[1].shape)[0] * matrix_shape(job[1].shape)[1],
            progress=progress,
            what="reading values",
        )
    )


def equal_groups(values: Sequence[TensorValues]) -> tuple[tuple[str, ...], ...]:
    """Names of tensors with equal bytes, dtype and shape: tied, or a layer used again.

    Tensors of one value throughout (norms of ones, biases of zeros) are equal by what they are,
    and left out.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for row in values:
        telling = row.health is None or (row.health.elements and not row.health.constant)
        if row.digest is not None and telling:
            groups[row.digest].append(row.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _read(job: tuple[str, LazyTensor]) -> TensorValues:
    name, tensor = job
    if tensor.dtype.torch is None:
        return TensorValues(name, tensor.dtype, tensor.shape, None, None)
    digest = hashlib.sha256(f"{tensor.dtype.name} {tensor.shape}".encode())
    sums = HealthSums() if tensor.dtype.is_float else None
    for block in _blocks(tensor):
        digest.update(block.contiguous().view(-1).view(torch.uint8).numpy().data)
        if sums is not None:
            sums.add(block)
    health = sums.health() if sums is not None else None
    return TensorValues(name, tensor.dtype, tensor.shape, health, digest.hexdigest())


def _blocks(tensor: LazyTensor) -> Iterable[Tensor]:
    """As matrices of consecutive rows; a vector is one row."""
    rows, columns = matrix_shape(tensor.shape)
    if len(tensor.shape) < 2:
        yield tensor.read().reshape(1, -1)
        return
    step = max(1, min(rows, _BLOCK_ELEMENTS // max(1, columns)))
    read = RowReader(tensor, step)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield read(start, stop).reshape(stop - start, columns)
