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

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.exact_sum import sum_rounded_to_odd, two_product
from loratool.algebra.kernels import decide_bf16
from loratool.algebra.lowrank import LowRank
from loratool.errors import NonFiniteValues, UnsupportedInput

U32 = 2.0**-24
U64 = 2.0**-53
_TINY = 2.0**-126
_GATHER_ELEMENTS = 2**18
"""Factor entries gathered at a time, so that they stay in the processor's cache."""

_UP = 1 + 1e-6
_HUGE = 2.0**100
"""Beyond this size float32 estimates might overflow; float64 decides then."""
_STEEP = 2.0**20
"""So is it with scales beyond this or below its inverse: what float32 loses of B·A to underflow
would be made large by them, and what they make small might have overflowed."""

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


class Rounder(Protocol):
    """What is done to one tensor, row by row, each result rounded once."""

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """Rows ``first_row : first_row + len(w0)`` changed and rounded to ``dtype``.

        w0: those rows of the tensor as stored, (rows, columns). Raises NonFiniteValues when w0
        holds NaN or infinity where numbers are needed. A result beyond the dtype's range is
        ±infinity and counted.
        """


@dataclass(frozen=True)
class _Decided:
    """What a level made of a block: values, flat positions it left open (their values are only
    close), how many values differ from w0, and the largest |w0|."""

    values: Tensor
    open: Tensor
    changed: int
    largest: float


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
        self._b64 = [b.double() for b in self._b32]
        self._at64 = [a.T.double().contiguous() for a in self._a32]  # so that columns lie together
        self._a_norm = [_norms_up(a, dim=0) for a in self._a32]
        self._b_norm = [_norms_up(b, dim=1) for b in self._b32]
        # per row of ΔW: no |ΔW_ij| is above ``size`` (Cauchy–Schwarz), and no sum of its products
        # errs by more than ``rounding`` units
        self._size = torch.zeros_like(self._b_norm[0])
        self._rounding = torch.zeros_like(self._b_norm[0])
        for term, a, b in zip(terms, self._a_norm, self._b_norm, strict=True):
            size = abs(term.scale) * (float(a.max()) if a.numel() else 0.0) * b
            self._size += size
            self._rounding += (1.01 * term.rank + 4) * size
        # each term is added with one rounding of the sum so far, and so is the margin; what is of
        # second order is covered by _UP
        self._adds = len(terms) + 1
        self._steep = any(t.scale and not 1 / _STEEP <= abs(t.scale) <= _STEEP for t in terms)

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """RN(w0 + ΔW[first_row : first_row + len(w0)]) in ``dtype``.

        w0: (rows, columns) in bf16, fp16 or fp32. Raises NonFiniteValues when w0 holds NaN or
        infinity. A result beyond the dtype's range is ±infinity, as IEEE rounding has it.
        """
        if w0.numel() == 0:
            return RoundedBlock(w0.to(dtype), 0, 0, 0, 0)
        rows = slice(first_row, first_row + w0.shape[0])
        if dtype == torch.float32:
            decided = self._decide_float64(w0, rows)
        elif self._steep:
            decided = _Decided(w0.to(dtype, copy=True), _everything(w0), 0, _largest(w0))
        else:
            decided = self._decide_float32(w0, rows, dtype)
        if not math.isfinite(decided.largest):
            bad = torch.nonzero(~torch.isfinite(w0))[0].tolist()
            raise NonFiniteValues(f"NaN or infinity at [{first_row + bad[0]}, {bad[1]}]")
        reach = decided.largest + float(self._size[rows].max())
        values, open_ = decided.values, decided.open
        if reach > _HUGE and dtype != torch.float32:
            open_ = _everything(w0)  # float32 may have overflowed
        start = w0.to(dtype).reshape(-1)
        flat = values.reshape(-1)
        changed = decided.changed - int((_bits(flat[open_]) != _bits(start[open_])).sum())
        level2 = 0 if dtype == torch.float32 else len(open_)
        left = open_
        if dtype != torch.float32 and len(open_):
            left = self._settle_float64(w0, first_row, open_, values)
        if len(left):
            self._settle_exactly(w0, first_row, left, values)
        changed += int((_bits(flat[open_]) != _bits(start[open_])).sum())
        might_overflow = reach >= torch.finfo(dtype).max
        overflowed = int(torch.isinf(values).sum()) if might_overflow else 0
        return RoundedBlock(values, changed, level2, len(left), overflowed)

    # Level 1 ---------------------------------------------------------------------------------

    def _decide_float32(self, w0: Tensor, rows: slice, dtype: torch.dtype) -> _Decided:
        estimate = _SCRATCH.like(w0, "estimate", torch.float32).copy_(w0)
        for term, b, a in zip(self._terms, self._b32, self._a32, strict=True):
            estimate.addmm_(b[rows], a, alpha=term.scale)
        per_row = self._rounding[rows] + self._adds * self._size[rows]
        margin = ((U32 * per_row + self._tiny(_TINY)) * _UP).float()
        per_value = U32 * self._adds * _UP
        both_bf16 = dtype == w0.dtype == torch.bfloat16
        decide = decide_bf16() if both_bf16 and w0.device.type == "cpu" else None
        if decide is not None:
            return _Decided(*decide(w0, estimate, margin, per_value))
        margins = torch.abs(estimate, out=_SCRATCH.like(w0, "margins", torch.float32))
        margins.mul_(per_value).add_(margin[:, None])
        rounded = _SCRATCH.like(w0, "rounded", torch.float32)
        low = _SCRATCH.like(w0, "low", dtype).copy_(torch.sub(estimate, margins, out=rounded))
        values = torch.empty(w0.shape, dtype=dtype, device=w0.device)
        values.copy_(estimate.add_(margins))
        open_ = _where_different(low, values)
        changed = _count_different(values, w0.to(dtype))
        return _Decided(values, open_, changed, _largest(w0))

    # Level 2 ---------------------------------------------------------------------------------

    def _decide_float64(self, w0: Tensor, rows: slice) -> _Decided:
        estimate = w0.double()
        size = estimate.abs().amax(dim=1)
        for term, b, at in zip(self._terms, self._b64, self._at64, strict=True):
            estimate.addmm_(b[rows], at.T, alpha=term.scale)
        per_row = self._rounding[rows] + self._adds * (size + self._size[rows])
        margin = (U64 * per_row + self._tiny(2.0**-1000))[:, None]
        low = (estimate - margin).float()
        values = estimate.add_(margin).float()
        open_ = _where_different(low, values)
        return _Decided(values, open_, _count_different(values, w0.float()), float(size.max()))

    def _tiny(self, smallest: float) -> float:
        return smallest * (2 + sum(term.rank + 2 for term in self._terms))

    def _settle_float64(self, w0: Tensor, first_row: int, open_: Tensor, values: Tensor) -> Tensor:
        """Decide the flat positions ``open_`` in float64, in place; return those still open."""
        still_open = [open_[:0]]
        width = max(1, max((term.rank for term in self._terms), default=1))
        columns = w0.shape[1]
        for part in torch.split(open_, max(1, _GATHER_ELEMENTS // width)):
            row, column = part // columns, part % columns
            start = w0[row, column].double()
            estimate, margin = start.clone(), self._adds * start.abs()
            for term, b, a, b_norm, a_norm in zip(
                self._terms, self._b64, self._at64, self._b_norm, self._a_norm, strict=True
            ):
                product = (b[first_row + row] * a[column]).sum(dim=1)
                estimate += term.scale * product
                size = abs(term.scale) * b_norm[first_row + row] * a_norm[column]
                margin += (1.01 * term.rank + 4 + self._adds) * size
            margin = U64 * margin + self._tiny(2.0**-1000)
            low = round_float64(estimate - margin, values.dtype)
            high = round_float64(estimate + margin, values.dtype)
            values[row, column] = high
            still_open.append(part[_bits(low) != _bits(high)])
        return torch.cat(still_open)

    # Level 3 ---------------------------------------------------------------------------------

    def _settle_exactly(self, w0: Tensor, first_row: int, open_: Tensor, values: Tensor) -> None:
        width = 1 + 2 * sum(term.rank for term in self._terms)
        for part in torch.split(open_, max(1, _GATHER_ELEMENTS // width)):
            row, column = part // w0.shape[1], part % w0.shape[1]
            start = w0[row, column]
            addends = [start.double().cpu().numpy()[None]]
            for term, b, a in zip(self._terms, self._b64, self._at64, strict=True):
                product = b[first_row + row] * a[column]
                addends += two_product(product.T.cpu().numpy(), np.float64(term.scale))
            exact = torch.from_numpy(sum_rounded_to_odd(np.concatenate(addends)))
            rounded = round_float64(exact, values.dtype).to(values.device)
            unchanged_zero = (exact == 0).to(start.device) & (start == 0)
            values[row, column] = torch.where(unchanged_zero, start.to(values.dtype), rounded)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of any precision to ``dtype``, to nearest, ties to even."""
    return (
        round_float64(values, dtype) if values.dtype == torch.float64 != dtype else values.to(dtype)
    )


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


def equal_bits(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors of one dtype are the same, zeros of either sign told apart."""
    return _bits(first) == _bits(second)


class _Scratch(threading.local):
    """Memory that a thread uses again for every block, since fresh pages cost as much as a pass."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, block: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of the block's shape; its last user's values are gone."""
        key = (name, dtype, block.device)
        held = self._memory.get(key)
        if held is None or held.numel() < block.numel():
            held = torch.empty(block.numel(), dtype=dtype, device=block.device)
            self._memory[key] = held
        return held[: block.numel()].view(block.shape)


_SCRATCH = _Scratch()


def _largest(values: Tensor) -> float:
    """The largest magnitude; NaN or infinity comes out as such."""
    if values.device.type != "cpu" or values.element_size() != 2:
        return float(values.abs().max())
    bits = _bits(values).numpy()
    positive = max(int(bits.max()), 0)  # magnitudes are ordered as their bits are
    negative = int(bits.view(np.uint16).max()) & 0x7FFF
    return float(torch.tensor([max(positive, negative)]).short().view(values.dtype))


def _everything(block: Tensor) -> Tensor:
    """All flat positions."""
    return torch.arange(block.numel(), device=block.device)


def _where_different(first: Tensor, second: Tensor) -> Tensor:
    """Flat positions where bits differ."""
    if first.device.type == "cpu":  # numpy is several times faster at this than torch
        return torch.from_numpy(_different_positions(_bits(first).numpy(), _bits(second).numpy()))
    return torch.nonzero((_bits(first) != _bits(second)).reshape(-1))[:, 0]


def _different_positions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Flat positions where integers differ, several compared at a time: hardly any do."""
    first, second = first.reshape(-1), second.reshape(-1)
    lanes = 8 // first.itemsize
    whole = len(first) // lanes * lanes
    words = np.flatnonzero(first[:whole].view(np.uint64) != second[:whole].view(np.uint64))
    near = (words[:, None] * lanes + np.arange(lanes)).reshape(-1)
    near = np.concatenate([near, np.arange(whole, len(first))])
    different: np.ndarray = near[first[near] != second[near]]
    return different


def _count_different(first: Tensor, second: Tensor) -> int:
    if first.device.type == "cpu":
        return int(np.count_nonzero(_bits(first).numpy() != _bits(second).numpy()))
    return int(torch.count_nonzero(_bits(first) != _bits(second)))


def _bits(values: Tensor) -> Tensor:
    width = torch.int32 if values.element_size() == 4 else torch.int16
    bits: Tensor = values.view(width)
    return bits


def _norms_up(factor: Tensor, dim: int) -> Tensor:
    """Euclidean norms in float64, rounded up."""
    norms: Tensor = torch.linalg.vector_norm(factor.double(), dim=dim)
    return norms * (1 + 1e-9)
