"""The change of one tensor between base and tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.factorize import sum_of_squares
from loratool.algebra.noise import NoiseFloor, noise_floor
from loratool.errors import NonFiniteValues
from loratool.layouts.pairs import Pair


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


def read_delta(pair: Pair, device: torch.device) -> Delta | None:
    """The change of a pair, or None when all values are equal.

    The subtraction runs in float32, in float64 where a side is float64. Raises NonFiniteValues
    naming the tensor and the first index where either side is NaN or infinite.
    """
    before, after = pair.base.read(), pair.tuned.read()
    if not before.is_floating_point():
        return (
            None
            if torch.equal(before, after)
            else Delta(torch.zeros(1, 1), 0.0, 0.0, NoiseFloor(0.0, 0.0), 1.0)
        )
    if before.dtype == after.dtype and torch.equal(before, after):
        return None
    before, after = before.to(device), after.to(device)
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    delta = (after.to(wide) - before.to(wide)).float()
    if not bool(torch.isfinite(delta).all()):
        where = torch.nonzero(~torch.isfinite(delta))[0].tolist()
        raise NonFiniteValues(
            f"{pair.name}: NaN or infinity at {where} in base or tuned",
            hint="the checkpoint is broken, or its training diverged",
        )
    matrix = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
    noise = noise_floor(after.reshape(matrix.shape))
    del after
    energy = sum_of_squares(matrix)
    if energy == 0:
        return None
    base_norm = sum_of_squares(before.float().reshape(matrix.shape)) ** 0.5
    changed = float(torch.count_nonzero(matrix)) / matrix.numel()
    return Delta(matrix, energy, base_norm, noise, changed)
