"""The change of one tensor between base and tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratool.algebra.blocks import sum_of_squares
from loratool.algebra.lowrank import LowRank
from loratool.algebra.noise import NoiseFloor, NoiseSums
from loratool.errors import NonFiniteValues
from loratool.layouts.pairs import Pair
from loratool.storage.views import Stored

_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Delta:
    """W − W0 as a float32 matrix; vectors as one row, kernels as (out, in·k…).

    energy: ‖D‖²_F in float64. base_norm: ‖W0‖_F. noise: what the tuned side's rounding puts into
    D. changed_share: share of entries that differ.
    """

    matrix: Tensor
    energy: float
    base_norm: float
    noise: NoiseFloor
    changed_share: float

    @property
    def norm(self) -> float:
        """‖D‖_F."""
        return float(self.energy**0.5)

    def minus(self, update: LowRank) -> Delta:
        """What is left of the change beside an update of it, in float32."""
        b, a = update.b.float(), update.a.float()
        matrix = torch.addmm(self.matrix, b, a, alpha=-update.scale)
        return replace(self, matrix=matrix, energy=sum_of_squares(matrix))


_NOT_NUMBERS = Delta(torch.zeros(1, 1), 0.0, 0.0, NoiseFloor(0.0, 0.0), 1.0)
"""The change of integer tensors: there is one, and it has no size."""


def read_delta(pair: Pair, device: torch.device) -> Delta | None:
    """The change of a pair, or None when all values are equal.

    Read and subtracted in blocks of rows, so that neither side is ever in memory whole. The
    subtraction runs in float32, in float64 where a side is float64. Raises NonFiniteValues naming
    the tensor and the first index where either side is NaN or infinite.
    """
    if not pair.base.dtype.is_float:
        return None if torch.equal(pair.base.read(), pair.tuned.read()) else _NOT_NUMBERS
    rows, columns = matrix_shape(pair.base.shape)
    matrix = torch.empty(rows, columns, dtype=torch.float32, device=device)
    noise = NoiseSums(columns, device)
    energy = base_energy = 0.0
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        before = _rows(pair.base, start, stop, columns).to(device)
        after = _rows(pair.tuned, start, stop, columns).to(device)
        block = matrix[start:stop]
        if torch.float64 in (before.dtype, after.dtype):
            block.copy_(after.double() - before.double())
        else:
            block.copy_(after).sub_(before)
        energy += sum_of_squares(block)
        base_energy += sum_of_squares(before)
        noise.add(after)
    if not math.isfinite(energy):
        where = torch.nonzero(~torch.isfinite(matrix))[0].tolist()
        index = where if len(pair.base.shape) == 2 else where[1:]
        raise NonFiniteValues(
            f"{pair.name}: NaN or infinity at {index} in base or tuned",
            hint="the checkpoint is broken, or its training diverged",
        )
    if energy == 0:
        return None
    changed = int(torch.count_nonzero(matrix)) / matrix.numel()
    return Delta(matrix, energy, float(base_energy**0.5), noise.floor(), changed)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """As a matrix: vectors are one row, kernels (out, in, k…) have in·k… columns."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _rows(info: Stored, start: int, stop: int, columns: int) -> Tensor:
    values = info.read() if len(info.shape) < 2 else info.read_rows(start, stop)
    return values.reshape(stop - start, columns)
