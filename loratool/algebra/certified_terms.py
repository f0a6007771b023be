"""RN(W0 + Σ of exactly known matrices): float64 with a bound, then the exact sum.

What ``CertifiedSum`` is to low-rank updates, for every other additive kind. The definition of the
result is the same, so it does not depend on the machine either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.exact_matrix import TINY, U64, ExactMatrix
from loratool.algebra.exact_sum import sum_rounded_to_odd
from loratool.algebra.rounding import RoundedBlock, equal_bits, round_float64
from loratool.errors import NonFiniteValues

_GATHER_DOUBLES = 2**22
_GATHER_ELEMENTS = 2**14
_UP = 1 + 1e-6


class CertifiedTerms:
    """Σ of the terms, ready to be added to blocks of rows, which count from ``start``.

    terms: in the tensor's own (rows, columns) orientation. Works on the CPU.
    """

    def __init__(self, terms: Sequence[ExactMatrix], start: int = 0):
        self._terms = list(terms)
        self._start = start

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """RN(w0 + ΔW) in ``dtype``. Raises NonFiniteValues when w0 holds NaN or infinity."""
        base = w0.cpu()
        finite_or_error(base, first_row)
        start = base.double()
        estimate, error = self.estimate(start, first_row)
        values, open_ = decide(estimate, error, dtype)
        for part in torch.split(open_, _GATHER_ELEMENTS) if len(open_) else ():
            row, column = part // base.shape[1], part % base.shape[1]
            exact = torch.from_numpy(self.exactly(start, first_row, row, column))
            settle(base, row, column, exact, values)
        return finished(base, values, len(open_))

    def estimate(self, start: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        """start + ΔW of these rows in float64, and a bound on the error of each."""
        rows = torch.arange(len(start)) + self._start + first_row
        return total(start, [term.block(rows) for term in self._terms])

    def exactly(self, start: Tensor, first_row: int, row: Tensor, column: Tensor) -> np.ndarray:
        """start + ΔW at chosen places of the block, rounded to odd. start: exact in float64."""
        found = [np.zeros(0)]
        if not len(row):
            return found[0]
        rows = row + self._start + first_row
        width = 1 + sum(len(term.exact(rows[:1], column[:1])) for term in self._terms)
        for part in torch.split(torch.arange(len(row)), max(1, _GATHER_DOUBLES // width)):
            i, j = rows[part], column[part]
            addends = [start[row[part], j].numpy()[None]]
            addends += [term.exact(i, j) for term in self._terms]
            found.append(sum_rounded_to_odd(np.concatenate(addends)))
        return np.concatenate(found)


def settle(base: Tensor, row: Tensor, column: Tensor, exact: Tensor, values: Tensor) -> None:
    """Round the exact results at these places, in ``values``; a zero that stays keeps its sign."""
    start = base[row, column]
    unchanged_zero = (exact == 0) & (start == 0)
    rounded = round_float64(exact, values.dtype)
    values[row, column] = torch.where(unchanged_zero, start.to(values.dtype), rounded)


def total(start: Tensor, terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """start + Σ terms in float64 with the bound on its error, given each term's."""
    estimate, error = start.clone(), torch.zeros_like(start)
    for value, bound in terms:
        estimate += value
        error += bound
        error += estimate.abs() * U64
    return estimate, error


def decide(estimate: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounded values, and the flat positions where the error leaves open which value it is."""
    margin = (error + 4 * U64 * estimate.abs() + TINY) * _UP
    low = round_float64(estimate - margin, dtype)
    high = round_float64(estimate + margin, dtype)
    open_ = torch.nonzero(~equal_bits(low, high).reshape(-1) | ~torch.isfinite(margin).reshape(-1))
    return high, open_[:, 0]


def finished(base: Tensor, values: Tensor, level3: int) -> RoundedBlock:
    """The block with its counts."""
    changed = int((~equal_bits(values, base.to(values.dtype))).sum())
    return RoundedBlock(values, changed, 0, level3, int(torch.isinf(values).sum()))


def finite_or_error(rows: Tensor, first_row: int) -> None:
    """Raises NonFiniteValues naming the first NaN or infinity of some rows."""
    if not bool(torch.isfinite(rows).all()):
        bad = torch.nonzero(~torch.isfinite(rows))[0].tolist()
        raise NonFiniteValues(f"NaN or infinity at [{first_row + bad[0]}, {bad[1]}]")
