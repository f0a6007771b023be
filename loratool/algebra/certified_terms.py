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
        rows = torch.arange(len(base)) + self._start + first_row
        estimate, error = total(base.double(), [term.block(rows) for term in self._terms])
        values, open_ = decide(estimate, error, dtype)
        for part in torch.split(open_, _GATHER_ELEMENTS) if len(open_) else ():
            row, column = part // base.shape[1], part % base.shape[1]
            self._settle(base, rows, row, column, values)
        return finished(base, values, len(open_))

    def _settle(
        self, base: Tensor, rows: Tensor, row: Tensor, column: Tensor, values: Tensor
    ) -> None:
        width = 1 + sum(len(term.exact(rows[row[:1]], column[:1])) for term in self._terms)
        for part in torch.split(torch.arange(len(row)), max(1, _GATHER_DOUBLES // width)):
            i, j = row[part], column[part]
            start = base[i, j]
            addends = [start.double().numpy()[None]]
            addends += [term.exact(rows[i], j) for term in self._terms]
            exact = torch.from_numpy(sum_rounded_to_odd(np.concatenate(addends)))
            unchanged_zero = (exact == 0) & (start == 0)
            rounded = round_float64(exact, values.dtype)
            values[i, j] = torch.where(unchanged_zero, start.to(values.dtype), rounded)


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
