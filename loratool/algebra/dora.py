"""DoRA merged exactly: RN of W0 + Σ w·(m·V/‖V‖ − W0) + further terms, V = W0 + s·B·A.

A norm is the square root of a rational number, so a merged element is decided like this: float64
with a bound on its error first; where that leaves two values possible, the sum of a rational and
of square roots in exact integer arithmetic, to as many digits as it takes. Square roots of
integers that are not rational multiples of each other are linearly independent over the
rationals, which tells when such a sum is rational and could lie on a rounding boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.certified_terms import decide, finished, finite_or_error, settle, total
from loratool.algebra.exact_matrix import TINY, U64, ExactMatrix
from loratool.algebra.exact_sum import fraction_to_odd
from loratool.algebra.rounding import RoundedBlock
from loratool.errors import NonFiniteValues

_BLOCK_ELEMENTS = 2**20
_TRUSTED = 0.01
"""Relative error of a squared norm up to which its bound is used; beyond, exact arithmetic."""


@dataclass(frozen=True)
class Dora:
    """One DoRA of a tensor.

    change: s·B·A in the tensor's own orientation. magnitude: float64, one for each line, NaN for
    lines that the update does not touch. by_column: lines are the tensor's columns (stored
    (in, out), and embeddings), else its rows. weight: what the user multiplies the change with.
    """

    change: ExactMatrix
    magnitude: Tensor
    weight: float = 1.0
    by_column: bool = False


class CertifiedDora:
    """Several DoRAs and additive terms on one tensor; blocks of rows count from ``start``.

    read_rows: rows ``i:j`` of the base tensor as a matrix, which norms over columns need, exact in
    float64.
    Works on the CPU. Raises NonFiniteValues for a line that cannot be normalised.
    """

    def __init__(
        self,
        doras: Sequence[Dora],
        terms: Sequence[ExactMatrix],
        read_rows: Callable[[int, int], Tensor],
        start: int = 0,
    ):
        self._doras = list(doras)
        self._terms = list(terms)
        self._read_rows = read_rows
        self._start = start
        self._column_norms = {
            index: self._norms_of_columns(dora)
            for index, dora in enumerate(self._doras)
            if dora.by_column
        }
        self._exact_norms: dict[tuple[int, int], Fraction] = {}

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """The merged rows. Raises NonFiniteValues when w0 holds NaN or infinity."""
        base = w0.cpu()
        finite_or_error(base, first_row)
        start = base.double()
        estimate, error = self.estimate(start, first_row)
        values, open_ = decide(estimate, error, dtype)
        row, column = open_ // base.shape[1], open_ % base.shape[1]
        exact = torch.from_numpy(self.exactly(start, first_row, row, column))
        settle(base, row, column, exact, values)
        return finished(base, values, len(open_))

    def estimate(self, start: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        """The merged rows in float64, and a bound on the error of each value.

        start: those rows of the base, exact in float64.
        """
        rows = torch.arange(len(start)) + self._start + first_row
        parts = [term.block(rows) for term in self._terms]
        for index, dora in enumerate(self._doras):
            parts += self._parts(index, dora, start, rows)
        kept_base = start * self._kept(rows)
        estimate, error = total(kept_base, parts)
        return estimate, error + 2 * U64 * kept_base.abs()

    def exactly(self, start: Tensor, first_row: int, row: Tensor, column: Tensor) -> np.ndarray:
        """The merged values at chosen places of the block, rounded to odd."""
        rows = torch.arange(len(start)) + self._start + first_row
        places = zip(row.tolist(), column.tolist(), strict=True)
        return np.array([self._exactly(start, rows, i, j) for i, j in places], dtype=np.float64)

    # float64 -----------------------------------------------------------------------------------

    def _kept(self, rows: Tensor) -> Tensor:
        """The share of W0 that stays, 1 − Σ w over the DoRAs of a line; broadcasts to the block."""
        kept = torch.ones(1, 1, dtype=torch.float64)
        for pattern in range(2 ** len(self._doras)):
            chosen = [d for k, d in enumerate(self._doras) if pattern >> k & 1]
            if not chosen:
                continue
            share = math.fsum([1.0, *(-dora.weight for dora in chosen)])
            here = torch.ones(1, 1, dtype=torch.bool)
            for k, dora in enumerate(self._doras):
                covered = ~torch.isnan(_lines(dora, dora.magnitude, rows))
                here = here & (covered if pattern >> k & 1 else ~covered)
            kept = torch.where(here, share, kept)
        return kept

    def _parts(
        self, index: int, dora: Dora, start: Tensor, rows: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """w·m·V/‖V‖ on the lines that the DoRA covers, with its error."""
        v, dv = total(start, [dora.change.block(rows)])
        if dora.by_column:
            norm, dnorm = (part[None] for part in self._column_norms[index])
        else:
            norm, dnorm = (part[:, None] for part in _squared_norms(v, dv, dim=1))
        factor = dora.weight * _lines(dora, dora.magnitude, rows)
        covered = ~torch.isnan(factor)
        trusted = dnorm <= _TRUSTED * norm
        root = torch.where(trusted & covered, norm, 1.0).sqrt()
        size = factor.abs() / root
        value = factor * v / root
        relative = torch.where(trusted, 0.51 * dnorm / root.square(), math.inf)
        error = size * dv * 1.01 + value.abs() * (relative + 8 * U64) + TINY
        error = torch.where(trusted, error, math.inf)
        return [(torch.where(covered, value, 0.0), torch.where(covered, error, 0.0))]

    def _norms_of_columns(self, dora: Dora) -> tuple[Tensor, Tensor]:
        count, columns = dora.change.shape
        norm = torch.zeros(columns, dtype=torch.float64)
        error = torch.zeros_like(norm)
        for first, base in self._blocks(count, columns):
            finite_or_error(base, first)
            rows = torch.arange(len(base)) + first
            v, dv = total(base.double(), [dora.change.block(rows)])
            part, dpart = _squared_norms(v, dv, dim=0)
            norm = norm + part
            error = error + dpart + U64 * norm
        return norm, error

    def _blocks(self, rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
        """The base tensor a part at a time, with each part's first row."""
        step = max(1, _BLOCK_ELEMENTS // max(1, columns))
        for first in range(0, rows, step):
            yield first, self._read_rows(first, min(first + step, rows))

    # Exactly -----------------------------------------------------------------------------------

    def _exactly(self, base: Tensor, rows: Tensor, i: int, j: int) -> float:
        """Element (i, j) of the block, rounded to odd."""
        row, column = rows[i : i + 1], torch.tensor([j])
        start = Fraction(float(base[i, j]))
        rational = start + sum((_entry(term, row, column) for term in self._terms), Fraction(0))
        roots = []
        for index, dora in enumerate(self._doras):
            line = j if dora.by_column else int(row)
            magnitude = float(dora.magnitude[line])
            if math.isnan(magnitude):
                continue
            weight = Fraction(dora.weight)
            rational -= weight * start
            v = start + _entry(dora.change, row, column)
            square = self._exact_norm(index, line, base[i])
            if not square:
                kind = "column" if dora.by_column else "row"
                raise NonFiniteValues(
                    f"{kind} {line} of the weight with its update is zero, which DoRA divides by"
                )
            roots.append((weight * Fraction(magnitude) * v, square))
        return sum_of_roots(rational, roots)

    def _exact_norm(self, index: int, line: int, base_row: Tensor) -> Fraction:
        key = (index, line)
        if key not in self._exact_norms:
            dora = self._doras[index]
            height, width = dora.change.shape
            if dora.by_column:
                rows, columns = torch.arange(height), torch.full((height,), line)
                base = torch.cat([part[:, line].clone() for _, part in self._blocks(height, width)])
            else:
                rows, columns = torch.full((width,), line), torch.arange(width)
                base = base_row
            addends = [base.double().numpy()[None], dora.change.exact(rows, columns)]
            self._exact_norms[key] = _sum_of_squares(np.concatenate(addends))
        return self._exact_norms[key]


def sum_of_roots(rational: Fraction, roots: Sequence[tuple[Fraction, Fraction]]) -> float:
    """rational + Σ cᵢ/√Nᵢ, exact where a double can hold it, else rounded to odd. N > 0."""
    groups: list[tuple[Fraction, Fraction]] = []
    for factor, square in roots:
        exact = _exact_root(square)
        if exact is not None:
            rational += factor / exact
            continue
        for k, (other_factor, other) in enumerate(groups):
            ratio = _exact_root(other / square)
            if ratio is not None:  # 1/√N = ratio/√other
                groups[k] = (other_factor + factor * ratio, other)
                break
        else:
            groups.append((factor, square))
    groups = [(factor, square) for factor, square in groups if factor]
    if not groups:
        return fraction_to_odd(rational)
    bits = 128
    while True:
        low = high = rational
        for factor, square in groups:
            below, above = _inverse_root(square, bits)
            low += factor * (below if factor > 0 else above)
            high += factor * (above if factor > 0 else below)
        ends = fraction_to_odd(low), fraction_to_odd(high)
        if ends[0] == ends[1]:
            return ends[0]
        bits *= 2


def _exact_root(value: Fraction) -> Fraction | None:
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    return (
        Fraction(top, bottom) if (top * top, bottom * bottom) == value.as_integer_ratio() else None
    )


def _inverse_root(square: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Two fractions that enclose 1/√square, to about this many significant bits."""
    p, q = square.as_integer_ratio()  # 1/√(p/q) = √(q·p)/p
    shift = max(0, bits - (p * q).bit_length() // 2)
    root = math.isqrt(p * q << 2 * shift)
    return Fraction(root, p << shift), Fraction(root + 1, p << shift)


def _entry(matrix: ExactMatrix, row: Tensor, column: Tensor) -> Fraction:
    return sum((Fraction(float(x)) for x in matrix.exact(row, column)[:, 0]), Fraction(0))


def _sum_of_squares(addends: np.ndarray) -> Fraction:
    """Σ over columns of (the column's exact sum)², exactly. addends: (K, N) doubles."""
    mantissas, exponents = np.frexp(addends)
    lowest = int(exponents.min())
    integers = (mantissas * 2.0**53).astype(np.int64).astype(object)
    shifted = integers << (exponents - lowest).astype(object)
    sums = shifted.sum(axis=0)
    total_ = int((sums * sums).sum())
    shift = 2 * (lowest - 53)
    return Fraction(total_ << shift) if shift >= 0 else Fraction(total_, 1 << -shift)


def _squared_norms(v: Tensor, dv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Σ v² along a dimension, by halving, with the bound on its error for v known within dv."""
    squares = v.square()
    sweeps = 1
    while squares.shape[dim] > 1:
        half = squares.shape[dim] // 2
        first = squares.narrow(dim, 0, half)
        second = squares.narrow(dim, half, half)
        odd = squares.narrow(dim, 2 * half, squares.shape[dim] - 2 * half)
        squares = torch.cat([first + second, odd], dim)
        sweeps += 1
    norm = squares.squeeze(dim) if v.shape[dim] else v.sum(dim)
    slack = (v.abs() * dv * 2 + dv.square()).sum(dim)
    return norm, slack * (1 + 1e-6) + norm * (U64 * (sweeps + 2) * 1.01) + TINY


def _lines(dora: Dora, values: Tensor, rows: Tensor) -> Tensor:
    return values[None] if dora.by_column else values[rows][:, None]
