"""Merged 8-bit weights that keep their scales: the nearest stored value to Y/s, exactly.

A weight q with the scale s means W0 = q·s. The target is Y = W0 + Σ ΔW, and the result the q' whose
value is nearest to Y/s. q' changes where Y passes t·s, t being the middle between two neighbouring
values of the format. q·s and t·s are exact in float64 (at most 5 and 24 significant bits). So Y is
estimated in float64 with its bound, and where that leaves several q' possible, the sign of
Y − t·s decides, from the exact sum. Ties go to the even code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.certified_terms import finite_or_error, total
from loratool.algebra.exact_matrix import TINY, U64, ExactMatrix
from loratool.algebra.exact_sum import sum_rounded_to_odd
from loratool.algebra.rounding import RoundedBlock
from loratool.errors import UnsupportedInput

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_GATHER_DOUBLES = 2**22
_SIGN = 0x80
_UP = 1 + 1e-6

Scales = Callable[[int, int], Tensor]
"""The scales of rows first:last of a tensor, float64, broadcasting to (rows, columns)."""


class CertifiedScaled:
    """Σ of the terms, ready to be added to blocks of scaled rows, which count from ``start``.

    terms: in the tensor's own orientation. scales: finite and positive where anything changes.
    Works on the CPU.
    """

    def __init__(self, terms: Sequence[ExactMatrix], scales: Scales, start: int = 0):
        self._terms = list(terms)
        self._scales = scales
        self._start = start

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """The nearest stored values to (w0·s + ΔW)/s, in w0's own dtype.

        Raises NonFiniteValues for NaN or infinity in w0, UnsupportedInput for impossible scales.
        What exceeds the format's range is counted and left at its largest value.
        """
        assert dtype == w0.dtype
        base = w0.cpu()
        finite_or_error(base.float(), first_row)
        first = self._start + first_row
        rows = torch.arange(first, first + len(base))
        scales = self._scales(first, first + len(base)).expand(base.shape)
        if not bool((torch.isfinite(scales) & (scales > 0)).all()):
            raise UnsupportedInput("a scale is zero, negative or not finite")
        start = base.double() * scales
        estimate, error = total(start, [term.block(rows) for term in self._terms])
        margin = (error + 8 * U64 * estimate.abs() + TINY) * _UP
        codes, middles = _table(dtype)
        low = np.searchsorted(middles, ((estimate - margin) / scales).numpy(), side="left")
        high = np.searchsorted(middles, ((estimate + margin) / scales).numpy(), side="right")
        open_ = np.flatnonzero(low != high)
        exact_zero = np.zeros(base.shape, bool)
        if len(open_):
            low = self._settle(base, start, scales, rows, open_, low, high, exact_zero)
        bits = codes[np.clip(low, 1, len(codes) - 2)]
        before = base.view(torch.uint8).numpy()
        unchanged = exact_zero & ((before & 0x7F) == 0)  # a zero keeps its sign
        bits = np.where(unchanged, before, bits)
        overflowed = int(((low == 0) | (low == len(codes) - 1)).sum())
        values = torch.from_numpy(bits).view(dtype)
        return RoundedBlock(values, int((bits != before).sum()), 0, len(open_), overflowed)

    def _settle(
        self,
        base: Tensor,
        start: Tensor,
        scales: Tensor,
        rows: Tensor,
        open_: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        exact_zero: np.ndarray,
    ) -> np.ndarray:
        """Halve the possible range of each open position until one value is left.

        Marks in ``exact_zero`` where Y is 0.
        """
        codes, middles = _table(base.dtype)
        columns, zero = base.shape[1], exact_zero.reshape(-1)
        low, high = low.reshape(-1).copy(), high.reshape(-1).copy()
        width = 2 + sum(
            len(term.exact(rows[:1], torch.zeros(1, dtype=torch.long))) for term in self._terms
        )
        for part in np.array_split(open_, 1 + len(open_) * width // _GATHER_DOUBLES):
            row, column = torch.from_numpy(part // columns), torch.from_numpy(part % columns)
            addends = [start[row, column].numpy()[None]]
            addends += [term.exact(rows[row], column) for term in self._terms]
            fixed, scale = np.concatenate(addends), scales[row, column].numpy()
            while (left := low[part] < high[part]).any():
                where = np.flatnonzero(left)
                middle = (low[part[where]] + high[part[where]]) // 2
                boundary = -middles[middle] * scale[where]
                side = sum_rounded_to_odd(np.concatenate([fixed[:, where], boundary[None]]))
                even_above = (codes[middle + 1] & 1) == 0
                zero[part[where]] |= (side == 0) & (boundary == 0)
                above = (side > 0) | ((side == 0) & even_above)
                low[part[where]] = np.where(above, middle + 1, low[part[where]])
                high[part[where]] = np.where(above, high[part[where]], middle)
        return low.reshape(base.shape)


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
