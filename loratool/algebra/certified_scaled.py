"""Merged 8-bit weights that keep their scales: the nearest stored value to Y/s, exactly.

A weight q with the scale s means W0 = q·s. The target is Y = W0 + Σ ΔW, and the result the q' whose
value is nearest to Y/s. q' changes where Y passes t·s, t being the middle between two neighbouring
values of the format. q·s and t·s are exact in float64 (at most 5 and 24 significant bits). So Y is
estimated in float64 with its bound, and where that leaves several q' possible, Y rounded to odd
is compared with t·s. Ties go to the even code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.certified_terms import finite_or_error
from loratool.algebra.exact_matrix import TINY, U64
from loratool.algebra.rounding import RoundedBlock
from loratool.errors import UnsupportedInput

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_SIGN = 0x80
_UP = 1 + 1e-6

Scales = Callable[[int, int], Tensor]
"""The scales of rows first:last of a tensor, float64, broadcasting to (rows, columns)."""


class Target(Protocol):
    """What becomes of rows that are given exactly in float64; the rest as CertifiedTerms has it."""

    def estimate(self, start: Tensor, first_row: int) -> tuple[Tensor, Tensor]: ...

    def exactly(self, start: Tensor, first_row: int, row: Tensor, column: Tensor) -> np.ndarray: ...


class CertifiedScaled:
    """A target of unpacked rows, packed again with the same scales; rows count from ``start``.

    target: in the tensor's own orientation, counting from there too. scales: finite and positive
    where anything changes. Works on the CPU.
    """

    def __init__(self, target: Target, scales: Scales, start: int = 0):
        self._target = target
        self._scales = scales
        self._start = start

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """The nearest stored values to Y/s, in w0's own dtype.

        Raises NonFiniteValues for NaN or infinity in w0, UnsupportedInput for impossible scales.
        What exceeds the format's range is counted and left at its largest value.
        """
        assert dtype == w0.dtype
        base = w0.cpu()
        start, scales = unpacked(base, self._scales, self._start + first_row, first_row)
        estimate, error = self._target.estimate(start, first_row)
        margin = (error + 8 * U64 * estimate.abs() + TINY) * _UP
        codes, middles = _table(dtype)
        low = np.searchsorted(middles, ((estimate - margin) / scales).numpy(), side="left")
        high = np.searchsorted(middles, ((estimate + margin) / scales).numpy(), side="right")
        undecided = ~torch.isfinite(margin).numpy()  # a division by about zero, in DoRA
        low[undecided], high[undecided] = 0, len(codes) - 1
        open_ = np.flatnonzero(low != high)
        exact_zero = np.zeros(base.shape, bool)
        if len(open_):
            place = torch.from_numpy(open_)
            row, column = place // base.shape[1], place % base.shape[1]
            exact = self._target.exactly(start, first_row, row, column)
            ends = low.reshape(-1)[open_], high.reshape(-1)[open_]
            low = low.copy()
            low.reshape(-1)[open_] = _between(exact, scales[row, column].numpy(), *ends, dtype)
            exact_zero.reshape(-1)[open_] = exact == 0
        bits = codes[np.clip(low, 1, len(codes) - 2)]
        before = base.view(torch.uint8).numpy()
        unchanged = exact_zero & ((before & 0x7F) == 0)  # a zero keeps its sign
        bits = np.where(unchanged, before, bits)
        overflowed = int(((low == 0) | (low == len(codes) - 1)).sum())
        values = torch.from_numpy(bits).view(dtype)
        return RoundedBlock(values, int((bits != before).sum()), 0, len(open_), overflowed)


def unpacked(
    base: Tensor, scales: Scales, first: int, named_from: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows times their scales, exact in float64, and the scales as large as the rows.

    first: the number of the first row. Raises NonFiniteValues, which counts rows from
    ``named_from``, and UnsupportedInput.
    """
    finite_or_error(base.float(), named_from)
    each = scales(first, first + len(base)).expand(base.shape)
    if not bool((torch.isfinite(each) & (each > 0)).all()):
        raise UnsupportedInput("a scale is zero, negative or not finite")
    return base.double() * each, each


def _between(
    exact: np.ndarray, scales: np.ndarray, low: np.ndarray, high: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """Which of the codes ``low`` to ``high`` is nearest, by halving.

    exact: rounded to odd, so that a comparison with a boundary, which has far fewer bits, is that
    of the true value.
    """
    codes, middles = _table(dtype)
    low, high = low.copy(), high.copy()
    while (left := low < high).any():
        middle = (low[left] + high[left]) // 2
        boundary, y = middles[middle] * scales[left], exact[left]
        even_above = (codes[middle + 1] & 1) == 0
        above = (y > boundary) | ((y == boundary) & even_above)
        low[left] = np.where(above, middle + 1, low[left])
        high[left] = np.where(above, high[left], middle)
    return low


def spacing(magnitudes: Tensor, dtype: torch.dtype) -> Tensor:
    """The step of an 8-bit format at values of these magnitudes (float64), without scales."""
    info = torch.finfo(dtype)
    size = magnitudes.clamp(min=info.smallest_normal, max=info.max)
    return torch.ldexp(torch.full_like(size, info.eps), torch.frexp(size)[1] - 1)


@cache
def _table(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes in the order of their values, and the boundary between each and the next.

    −0 and +0 are two codes with the boundary 0. The first and the last stand for overflow: their
    boundaries are half a step beyond the largest value, and the last has the code that would come
    next, for ties.
    """
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(dtype).double().numpy()
    finite = np.isfinite(values)
    codes, values = every.numpy()[finite], values[finite]
    order = np.lexsort((-(codes >= _SIGN).astype(int), values))
    codes, values = codes[order], values[order]
    beyond = values[-1] + (values[-1] - values[-2]) / 2
    middles = np.concatenate([[-beyond], (values[:-1] + values[1:]) / 2, [beyond]])
    return np.concatenate([codes[:1], codes, codes[-1:] + np.uint8(1)]), middles
