"""Merged weights, correctly rounded: each element is RN(W0 + Σ sᵢ·BᵢAᵢ), ties to even.

The inputs are the stored values, read exactly, and each s is one double, so the sum is a definite
number and its nearest value in the output dtype does not depend on BLAS, threads, block sizes or
device. Three levels decide it, each on what the one before left open:

1. float32 products with an a-priori error bound: where estimate − bound and estimate + bound round
   to the same value, that value is the answer (bf16 and fp16 outputs);
2. float64 products with their bound;
3. the exact sum: products of two values of at most 24 bits are exact in float64, the product with
   s is split without error (Dekker, 1971), and the terms are summed without error by repeated
   TwoSum sweeps (Ogita, Rump and Oishi, 2005, VecSum) until the leading double and the sign of
   the rest are certain.

Rounding from float64 to 16 bits goes through float32 rounded to odd, so it happens once.
Bounds: standard dot product analysis (Higham, 2002, §3.1), γ_r ≤ 1.01·r·u for r·u < 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.errors import NonFiniteValues, UnsupportedInput

U32 = 2.0**-24
U64 = 2.0**-53
_TINY = 2.0**-126
_GATHER_ELEMENTS = 2**22
_MAX_SWEEPS = 12
_SPLITTER = 2.0**27 + 1

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class RoundedBlock:
    """Merged rows and what it took: ``values`` in the output dtype; counts of elements.

    changed: differ from the base rounded to the output dtype. level2, level3: left open by the
    level before. overflowed: beyond the dtype's range, hence infinite.
    """

    values: Tensor
    changed: int
    level2: int
    level3: int
    overflowed: int


class CertifiedSum:
    """Σ sᵢ·BᵢAᵢ for one tensor, ready to be added to blocks of its rows.

    terms: updates in the tensor's own (rows, columns) orientation, factors of at most float32
    precision, on one device. Raises UnsupportedInput for float64 factors and NonFiniteValues for
    NaN or infinite ones.
    """

    def __init__(self, terms: Sequence[LowRank]):
        for term in terms:
            for factor in (term.b, term.a):
                if factor.dtype not in MERGEABLE:
                    raise UnsupportedInput(f"adapter factors of {factor.dtype} cannot be merged")
                if not bool(torch.isfinite(factor).all()):
                    raise NonFiniteValues("the adapter's factors hold NaN or infinity")
        self._terms = list(terms)
        self._a32 = [term.a.float().contiguous() for term in terms]
        self._b32 = [term.b.float().contiguous() for term in terms]
        self._a_norm = [_norms_up(a, dim=0) for a in self._a32]
        self._b_norm = [_norms_up(b, dim=1) for b in self._b32]
        self._a_max = [float(norm.max()) if norm.numel() else 0.0 for norm in self._a_norm]
        self._adds = len(terms) + 2

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """RN(w0 + ΔW[first_row : first_row + len(w0)]) in ``dtype``.

        w0: (rows, columns) in bf16, fp16 or fp32. Raises NonFiniteValues when w0 holds NaN or
        infinity. A result beyond the dtype's range is ±infinity, as IEEE rounding has it.
        """
        rows = slice(first_row, first_row + w0.shape[0])
        if w0.numel() == 0:
            return RoundedBlock(w0.to(dtype), 0, 0, 0, 0)
        largest = w0.abs().amax(dim=1, keepdim=True).double()
        if not bool(torch.isfinite(largest).all()):
            bad = torch.nonzero(~torch.isfinite(w0))[0].tolist()
            raise NonFiniteValues(f"NaN or infinity at [{first_row + bad[0]}, {bad[1]}]")
        level2 = 0
        if dtype == torch.float32:
            values, open_ = self._decide_float64(w0, rows, largest)
        else:
            values, open_ = self._decide_float32(w0, rows, largest, dtype)
            level2 = len(open_)
            open_ = self._settle_float64(w0, first_row, open_, values)
        self._settle_exactly(w0, first_row, open_, values)
        changed = int((_bits(values) != _bits(w0.to(dtype))).sum())
        reach = float((largest + self._size_bound(rows)).max())
        might_overflow = reach >= torch.finfo(dtype).max
        overflowed = int(torch.isinf(values).sum()) if might_overflow else 0
        return RoundedBlock(values, changed, level2, len(open_), overflowed)

    # Level 1 ---------------------------------------------------------------------------------

    def _decide_float32(
        self, w0: Tensor, rows: slice, largest: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        estimate = w0.float()
        for term, b, a in zip(self._terms, self._b32, self._a32, strict=True):
            estimate.addmm_(b[rows], a, alpha=term.scale)
        margin = self._row_bound(rows, largest, U32, _TINY).float() * (1 + 2 * U32)
        low = (estimate - margin).to(dtype)
        values = estimate.add_(margin).to(dtype)
        return values, torch.nonzero(_bits(low) != _bits(values))

    # Level 2 ---------------------------------------------------------------------------------

    def _decide_float64(self, w0: Tensor, rows: slice, largest: Tensor) -> tuple[Tensor, Tensor]:
        estimate = w0.double()
        for term, b, a in zip(self._terms, self._b32, self._a32, strict=True):
            estimate.addmm_(b[rows].double(), a.double(), alpha=term.scale)
        margin = self._row_bound(rows, largest, U64, 2.0**-1000)
        low = (estimate - margin).float()
        values = estimate.add_(margin).float()
        return values, torch.nonzero(_bits(low) != _bits(values))

    def _row_bound(self, rows: slice, largest: Tensor, unit: float, tiny: float) -> Tensor:
        """(rows, 1) float64: bound on |estimate − Y|, and on rounding estimate ± bound itself."""
        rounding = self._adds * (largest + self._size_bound(rows))
        for term, b_norm, a_max in zip(self._terms, self._b_norm, self._a_max, strict=True):
            rounding += (1.01 * term.rank + 4) * abs(term.scale) * a_max * b_norm[rows, None]
        return unit * rounding + self._tiny(tiny)

    def _size_bound(self, rows: slice) -> Tensor:
        """(rows, 1) float64: no |ΔW_ij| of a row is above it (Cauchy–Schwarz)."""
        size = torch.zeros_like(self._b_norm[0][rows, None])
        for term, b_norm, a_max in zip(self._terms, self._b_norm, self._a_max, strict=True):
            size += abs(term.scale) * a_max * b_norm[rows, None]
        return size

    def _tiny(self, smallest: float) -> float:
        return smallest * (2 + sum(term.rank + 2 for term in self._terms))

    def _settle_float64(
        self, w0: Tensor, first_row: int, positions: Tensor, values: Tensor
    ) -> Tensor:
        """Decide ``positions`` (N, 2) in float64, in place; return those still open."""
        still_open = []
        width = max(1, max((term.rank for term in self._terms), default=1))
        for part in torch.split(positions, max(1, _GATHER_ELEMENTS // width)):
            row, column = part[:, 0], part[:, 1]
            start = w0[row, column].double()
            estimate, margin = start.clone(), self._adds * start.abs()
            for term, b, a, b_norm, a_norm in zip(
                self._terms, self._b32, self._a32, self._b_norm, self._a_norm, strict=True
            ):
                product = (b[first_row + row].double() * a[:, column].T.double()).sum(dim=1)
                estimate += term.scale * product
                size = abs(term.scale) * b_norm[first_row + row] * a_norm[column]
                margin += (1.01 * term.rank + 4 + self._adds) * size
            margin = U64 * margin + self._tiny(2.0**-1000)
            low = round_float64(estimate - margin, values.dtype)
            high = round_float64(estimate + margin, values.dtype)
            values[row, column] = high
            still_open.append(part[_bits(low) != _bits(high)])
        return torch.cat(still_open) if still_open else positions

    # Level 3 ---------------------------------------------------------------------------------

    def _settle_exactly(
        self, w0: Tensor, first_row: int, positions: Tensor, values: Tensor
    ) -> None:
        width = 1 + 2 * sum(term.rank for term in self._terms)
        for part in torch.split(positions, max(1, _GATHER_ELEMENTS // width)):
            row, column = part[:, 0], part[:, 1]
            start = w0[row, column]
            addends = [start.double().cpu().numpy()[None]]
            for term, b, a in zip(self._terms, self._b32, self._a32, strict=True):
                product = b[first_row + row].double() * a[:, column].T.double()
                addends += _scaled_exactly(product.T.cpu().numpy(), term.scale)
            exact = torch.from_numpy(_sum_rounded_to_odd(np.concatenate(addends)))
            rounded = round_float64(exact, values.dtype).to(values.device)
            unchanged_zero = (exact == 0).to(start.device) & (start == 0)
            values[row, column] = torch.where(unchanged_zero, start.to(values.dtype), rounded)


def round_float64(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to ``dtype`` (bf16, fp16, fp32), rounded once, to nearest, ties to even.

    The cast that frameworks offer goes through float32 and so rounds twice.
    """
    nearest = values.float()
    if dtype == torch.float32:
        return nearest
    back = nearest.double()
    bits = nearest.view(torch.int32)
    inexact = (back != values) & torch.isfinite(nearest)
    too_far = inexact & (back.abs() > values.abs())
    odd: Tensor = torch.where(inexact, (bits - too_far.int()) | 1, bits)
    rounded: Tensor = odd.view(torch.float32).to(dtype)
    return rounded


def _bits(values: Tensor) -> Tensor:
    width = torch.int32 if values.element_size() == 4 else torch.int16
    bits: Tensor = values.view(width)
    return bits


def _norms_up(factor: Tensor, dim: int) -> Tensor:
    """Euclidean norms in float64, rounded up."""
    norms: Tensor = torch.linalg.vector_norm(factor.double(), dim=dim)
    return norms * (1 + 1e-9)


def _scaled_exactly(products: np.ndarray, scale: float) -> list[np.ndarray]:
    """``scale · products`` as an unevaluated sum of two arrays, without error (TwoProduct)."""
    high = products * scale
    p_high, p_low = _split(products)
    s_high, s_low = _split(np.float64(scale))
    low = ((p_high * s_high - high) + p_high * s_low + p_low * s_high) + p_low * s_low
    return [high, low]


def _split(values: np.ndarray | np.float64) -> tuple[np.ndarray, np.ndarray]:
    scaled = values * _SPLITTER
    high = scaled - (scaled - values)
    return np.asarray(high), np.asarray(values - high)


def _sum_rounded_to_odd(addends: np.ndarray) -> np.ndarray:
    """Column sums of (K, N) doubles, exact where representable, else rounded to odd.

    Rounding to odd keeps, in 53 bits, which side of every narrower rounding boundary the exact
    sum lies on.
    """
    result = np.empty(addends.shape[1])
    active = np.arange(addends.shape[1])
    terms = addends
    for _ in range(_MAX_SWEEPS):
        if not len(active):
            return result
        terms = _two_sum_sweep(terms)
        head, rest = terms[-1], terms[:-1]
        size = np.abs(rest).sum(axis=0)
        tail = rest.sum(axis=0)
        certain = np.abs(tail) > size * (2 * len(rest) * U64)
        done = (size == 0) | (certain & (head + tail == head))
        result[active[done]] = _to_odd(head[done], np.sign(tail[done]))
        active, terms = active[~done], terms[:, ~done]
    for index, column in zip(active, terms.T, strict=True):
        result[index] = _fraction_to_odd(sum((Fraction(float(x)) for x in column), Fraction(0)))
    return result


def _two_sum_sweep(terms: np.ndarray) -> np.ndarray:
    """One VecSum pass: the same exact sum, with its leading part collected in the last row."""
    swept = np.empty_like(terms)
    head = terms[0]
    for index in range(1, len(terms)):
        total = head + terms[index]
        part = total - head
        swept[index - 1] = (head - (total - part)) + (terms[index] - part)
        head = total
    swept[-1] = head
    return swept


def _to_odd(head: np.ndarray, side: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(head).view(np.int64)
    inward = (side != 0) & (side * np.sign(head) < 0)
    return np.where(side != 0, (bits - inward) | 1, bits).view(np.float64)


def _fraction_to_odd(value: Fraction) -> float:
    nearest = float(value)
    side = (value > Fraction(nearest)) - (value < Fraction(nearest))
    return float(_to_odd(np.array([nearest]), np.array([float(side)]))[0])
