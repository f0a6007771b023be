"""A matrix's change as a DoRA update: directions by low-rank factors, row norms exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.dora_fit import dora_residual_norm, fit_dora, row_norms
from loratool.algebra.factorize import Factors, identity_factors
from loratool.algebra.lowrank import LowRank
from loratool.errors import Unplaced, UnsupportedInput
from loratool.layouts.pairs import Pair
from loratool.ops.adapter_folder import stored_value
from loratool.ops.deltas import matrix_shape
from loratool.storage.dtypes import DType


@dataclass(frozen=True)
class DoraValue:
    """What is stored, in the module's orientation (out, in).

    value: B·A in the adapter's dtype. magnitude: (out,) float32, the tuned weight's row norms.
    missed: ‖W − merged‖_F of these. first, last: the factors of W − W0 and those of the last
    sweep; None at full rank.
    """

    value: LowRank
    magnitude: Tensor
    missed: float
    sweeps: int
    first: Factors | None
    last: Factors | None


def dora_value(
    pair: Pair,
    delta: Tensor,
    dtype: DType,
    factorise: Callable[[Tensor], Factors] | None,
    *,
    transposed: bool,
) -> DoraValue | None:
    """Fit and round; None where the rank rule keeps nothing.

    delta: W − W0 as stored, float32. factorise: by the rank rule; None for full rank. transposed:
    the module's rows are the stored columns. Raises Unplaced for a row that would be zero, since
    DoRA divides by its norm, and UnsupportedInput for float64.
    """
    w0, w = (_matrix(side, delta) for side in (pair.base, pair.tuned))
    if transposed:
        w0, w, delta = w0.T, w.T, delta.T
    first = last = None
    sweeps = 0
    if factorise is None:
        product = identity_factors(delta)
    else:
        fit = fit_dora(w0, w, delta, factorise)
        if fit is None:
            return None
        product, first, last, sweeps = fit.value, fit.first, fit.last, fit.sweeps
    value = stored_value(pair.name, product, dtype)
    magnitude = row_norms(w).float()
    adapted = row_norms(torch.addmm(w0, value.b.float(), value.a.float()))
    if not bool((adapted > 0).all()):
        row = int(torch.nonzero(adapted == 0)[0])
        raise Unplaced(
            f"{pair.name}: output {row} is zero in base and adapter; DoRA divides by its norm",
            hint=f"--rank-for {pair.name}=whole stores the matrix whole",
        )
    missed = dora_residual_norm(w0, w, value, magnitude)
    return DoraValue(value, magnitude, missed, sweeps, first, last)


def _matrix(side: object, like: Tensor) -> Tensor:
    values: Tensor = side.read()  # type: ignore[attr-defined]
    if values.dtype == torch.float64:
        raise UnsupportedInput("DoRA is not fitted to float64 checkpoints")
    return values.reshape(matrix_shape(tuple(values.shape))).to(like.device, torch.float32)
