"""The best low-rank approximation of a dense difference, exactly or by a randomised method.

Small matrices: eigenvectors of the float64 Gram matrix of the smaller side. Large ones: the block
method of ``krylov``, whose sketch grows until the rank rule is satisfied. Products run in float32,
norms and small eigenproblems in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.blocks import block_rows, float64_blocks
from loratool.algebra.certificate import EXACT, ExcessBound, excess_bound
from loratool.algebra.energies import row_energies, sum_of_squares, total
from loratool.algebra.krylov import (
    OVERSAMPLING,
    Ritz,
    block_krylov,
    settled,
    sketch_pays,
    steered_start,
    was_drowned,
)
from loratool.algebra.lowrank import LowRank
from loratool.algebra.passes import RoughMatrix, fastest_dtype, image_and_back
from loratool.algebra.ranks import RankRule, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.stopwatch import Stopwatch

EXACT_SIDE = 512
"""Up to this smaller side the Gram matrix is cheaper than a sketch."""

_LEAST_ROWS = 64
"""Of a block: with fewer, a product spends its time on getting the other factor into cache."""

_CHECKED = 17
"""One row of so many: odd, since what rows hold may go by multiples of 16."""
_AGREEMENT, _FAR_FROM_IT = 1e-7, 2e-6
"""Of the energy of the rows that are checked: of all, and of so few that chance plays a part."""
_SMALL = 1e-3
"""Missed less than this share of an update, its float32 rounding might be seen in a millionth."""

COMFORTABLE = 1e8
"""Norms within this factor of one: their fourth powers stay well inside float32's range."""


@dataclass(frozen=True)
class Factors:
    """The leading part of D's singular value decomposition.

    u: (m, k) and v: (n, k) with orthonormal columns, float32. spectrum: every value that was
    resolved (more than k, where there are more), with D's total energy. bound: how much more than
    the best rank-k matrix this one can miss.
    """

    u: Tensor
    v: Tensor
    spectrum: Spectrum
    method: str
    bound: ExcessBound

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def low_rank(self) -> LowRank:
        """The balanced update (U·√Σ)(√Σ·Vᵀ), scale 1, float32."""
        root = self.spectrum.values[: self.rank].sqrt().to(self.u)
        return LowRank(self.u * root, (self.v * root).T)


@dataclass(frozen=True)
class _Right:
    """All right singular vectors (n, n) and values of a tall matrix, descending."""

    v: Tensor
    values: Tensor


def factorize(
    d: Tensor,
    rule: RankRule,
    *,
    key: str,
    exact: bool = False,
    noise_floor: float = 0.0,
    energy: float | None = None,
    sketch_dtype: torch.dtype | None = None,
    rough: Tensor | None = None,
    stopwatch: Stopwatch | None = None,
) -> Factors:
    """The components of ``d`` that ``rule`` keeps.

    d: (m, n) float32, on any device, finite. ``key`` (a seed and the tensor's name) determines
    the random start block, so that results do not depend on the order of the work. ``exact``
    forbids the randomised method. ``noise_floor`` is handed to the rule. ``energy`` is ‖d‖²_F where
    the caller knows it. ``sketch_dtype`` is that of the products which only steer the randomised
    method (default: the device's fastest); ``rough`` is ``d`` in that dtype where there is a copy
    already. ``stopwatch`` is told the stages sketch, orthogonalise
    and certify. The sign of each pair is fixed: the entry of the left vector with the largest
    magnitude is positive.
    """
    stopwatch = stopwatch or Stopwatch()
    energy = sum_of_squares(d) if energy is None else energy
    tall = _Tall.of(d, energy, noise_floor, rough)
    sketch = None if exact else _triplets(tall, key, sketch_dtype, stopwatch)
    resolved = _resolve(tall, rule, sketch, stopwatch)
    spectrum, rank, parts = resolved
    with stopwatch.stage("orthogonalise"):
        u, v = _vectors(tall, resolved)
    if isinstance(parts, Ritz):
        one_more = parts.values[: len(spectrum.values) + 1].cpu()
        spectrum = replace(spectrum, values=one_more)
        with stopwatch.stage("certify"):
            bound = excess_bound(tall.matrix, parts, rank, tall.energy, key)
        method = "block Krylov"
    else:
        bound, method = EXACT, "exact (Gram)"
    u, v = _with_fixed_signs(u, v)
    return Factors(u, v, tall.original(spectrum), method, bound)


class Triplets(NamedTuple):
    """Leading singular triplets: u (m, k) and v (n, k) float32, values (k,) float64, descending."""

    u: Tensor
    values: Tensor
    v: Tensor


def leading_triplets(d: Tensor, rank: int, *, key: str) -> Triplets:
    """The ``rank`` leading singular triplets of ``d``, or all of a matrix of fewer.

    As ``factorize`` finds them, without the certificate, which costs as much again: for what is
    measured afterwards, or only has to point somewhere.
    """
    rule = parse_rank_rule(str(rank))
    tall = _Tall.of(d, sum_of_squares(d), 0.0)
    stopwatch = Stopwatch()
    resolved = _resolve(tall, rule, _triplets(tall, key, None, stopwatch), stopwatch)
    values = tall.original(resolved.spectrum).values[: resolved.rank]
    u, v = _with_fixed_signs(*_vectors(tall, resolved))
    return Triplets(u, values, v)


@dataclass(frozen=True)
class _Tall:
    """The matrix as it is worked on: not wider than tall, and of a norm that is easy on float32.

    energy: ‖matrix‖²_F. noise_floor: in its units. scale: a power of two, what the matrix was
    multiplied by. rough: the matrix in a fast dtype, where there is a copy.
    """

    matrix: Tensor
    energy: float
    noise_floor: float
    scale: float
    transposed: bool
    rough: Tensor | None = None

    @staticmethod
    def of(d: Tensor, energy: float, noise_floor: float, rough: Tensor | None = None) -> _Tall:
        norm = math.sqrt(energy)
        scale = 1.0
        if norm > COMFORTABLE or 0 < norm < 1 / COMFORTABLE:
            scale = 2.0 ** -math.frexp(norm)[1]
            d, rough = _scaled(d, scale), None
        transposed = d.shape[0] < d.shape[1]
        matrix = d.T if transposed else d
        if rough is not None and transposed:
            rough = rough.T
        return _Tall(matrix, energy * scale * scale, noise_floor * scale, scale, transposed, rough)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def original(self, spectrum: Spectrum) -> Spectrum:
        """A spectrum of this matrix as that of the original one."""
        rows, columns = spectrum.shape
        return replace(
            spectrum,
            values=spectrum.values / self.scale,
            total_energy=spectrum.total_energy / self.scale / self.scale,
            noise_floor=spectrum.noise_floor / self.scale,
            shape=(columns, rows) if self.transposed else (rows, columns),
        )


def _scaled(d: Tensor, scale: float) -> Tensor:
    """d·scale; a power of two beyond float32's range takes two steps."""
    half = 2.0 ** (math.frexp(scale)[1] // 2)
    return (d * half) * (scale / half)


class _Resolved(NamedTuple):
    """A spectrum that decides the rule, the rank it gives, and what factors are made from."""

    spectrum: Spectrum
    rank: int
    parts: Ritz | _Right | Tensor


def _resolve(
    tall: _Tall,
    rule: RankRule,
    sketch: Callable[[int], Ritz | Tensor | None] | None,
    stopwatch: Stopwatch,
) -> _Resolved:
    """Resolve values of a tall matrix until the rule is decided.

    sketch: from a number of values to at least as many, in float64, or None where it has none;
    None: all, exactly.
    """
    d, shape = tall.matrix, tall.shape
    if sketch is not None:
        guess = rule.first_guess(shape)
        while shape[1] > EXACT_SIDE and sketch_pays(guess, shape[1]):
            found = sketch(guess)
            if found is None:
                break
            values = found.values if isinstance(found, Ritz) else found
            spectrum = Spectrum(values[:guess].cpu(), tall.energy, shape, tall.noise_floor)
            rank = rule(tall.original(spectrum))
            if rank is not None:
                return _Resolved(spectrum, rank, found)
            guess *= 2
    with stopwatch.stage("sketch"):
        right = _gram_eigenvectors(d)
    spectrum = Spectrum(right.values.cpu(), tall.energy, shape, tall.noise_floor)
    rank = rule(tall.original(spectrum))
    assert rank is not None, "a complete spectrum decides every rule"
    return _Resolved(spectrum, rank, right)


def _triplets(
    tall: _Tall, key: str, dtype: torch.dtype | None, stopwatch: Stopwatch
) -> Callable[[int], Ritz]:
    """Sketches with vectors."""
    d = tall.matrix

    def sketch(guess: int) -> Ritz:
        steered_in, apply = dtype or fastest_dtype(d.device), partial(image_and_back, d)
        with stopwatch.stage("sketch"):
            rough = RoughMatrix(d, steered_in, tall.rough)
            start = steered_start(rough, guess + OVERSAMPLING, key)
            del rough  # its memory
        found = block_krylov(apply, start, stopwatch=stopwatch)
        if steered_in.itemsize < start.itemsize and was_drowned(found.theta, guess):
            start = found.back[:, : start.shape[1]].float()
            found = block_krylov(apply, start, stopwatch=stopwatch)
        return found

    return sketch


def _vectors(tall: _Tall, resolved: _Resolved) -> tuple[Tensor, Tensor]:
    """Left and right vectors of the rank that was decided, as the original matrix has them."""
    rank, parts = resolved.rank, resolved.parts
    if isinstance(parts, Ritz):
        u, v = parts.left(rank), parts.right(rank)
    else:
        assert isinstance(parts, _Right), "values alone have no vectors"
        u, v = _left_from_right(tall.matrix, parts.v[:, :rank], parts.values[:rank])
    return (v, u) if tall.transposed else (u, v)


def resolve_spectrum(
    d: Tensor,
    rule: RankRule,
    *,
    key: str,
    exact: bool = False,
    noise_floor: float = 0.0,
    energy: float | None = None,
    sketch_dtype: torch.dtype | None = None,
    rough: Tensor | None = None,
) -> Spectrum:
    """The singular values that ``rule`` looks at, each to 1 % or 10⁻⁵ of the largest.

    Without factors, and so without the certificate that costs a good part of theirs. Arguments:
    see ``factorize``.
    """
    tall = _Tall.of(d, sum_of_squares(d) if energy is None else energy, noise_floor, rough)
    dtype = sketch_dtype or fastest_dtype(d.device)
    sketch = partial(
        settled, tall.matrix, key=key, energy=tall.energy, dtype=dtype, copy=tall.rough
    )
    resolved = _resolve(tall, rule, None if exact else sketch, Stopwatch())
    return tall.original(resolved.spectrum)


def identity_factors(d: Tensor) -> LowRank:
    """``d`` itself as B·A with the identity on its smaller side: full rank, without any error.

    An SVD's factors, rounded to float32, would miss each entry by about 2⁻²⁴ of its row's norm,
    which is many units in the last place of an entry that is small for its row.
    """
    rows, columns = d.shape
    identity = torch.eye(min(rows, columns), dtype=d.dtype, device=d.device)
    return LowRank(d, identity) if rows >= columns else LowRank(identity, d)


def residual_norm(d: Tensor, update: LowRank) -> float:
    """‖D − s·B·A‖_F with the factors as stored, to a millionth of itself.

    Squares and their sum are in float64; so is the product of one row in seventeen. In the others
    it is in float32, as long as the two agree to 10⁻⁷ on the rows that have both: where rounding
    is no longer small beside what is missed, or not independent of it, they do not, and all is
    done in float64. So it is where little is missed of a large update, or little of what is missed
    lies in the rows looked at: they may not be those whose rounding counts.
    """
    step = max(_LEAST_ROWS, block_rows(d.shape[1]))
    exact, single = (_Missed(d, update, dtype, step) for dtype in (torch.float64, torch.float32))
    energy = _mostly_single(exact, single) if len(d) > step else None
    if energy is None:
        energy = math.fsum(total(exact.energies(start)) for start in exact.starts)
    return math.sqrt(energy)


def _mostly_single(exact: _Missed, single: _Missed) -> float | None:
    """The squared norm from ``single`` alone; None where rows of ``exact`` speak against it."""
    missed, checked, seen = 0.0, 0.0, 0.0
    for start in exact.starts:
        some = slice(-start % _CHECKED, None, _CHECKED)
        energies, true = single.energies(start), total(exact.energies(start, some))
        missed, checked, seen = (
            missed + total(energies),
            checked + true,
            seen + total(energies[some]),
        )
        if not abs(seen - checked) <= _FAR_FROM_IT * checked:
            return None
    agree = abs(seen - checked) <= _AGREEMENT * checked
    representative = 4 * _CHECKED * checked >= missed >= _SMALL**2 * exact.update_energy
    return missed if agree and representative else None


class _Missed:
    """‖D − s·B·A‖² of some rows, the product in ``dtype``, squares and sum in float64."""

    def __init__(self, d: Tensor, update: LowRank, dtype: torch.dtype, step: int):
        self._d, self._step = d, step
        self._b, self._a = update.b.to(dtype), (update.a.double() * update.scale).to(dtype)
        self._buffer = torch.empty(min(step, len(d)), d.shape[1], dtype=dtype, device=d.device)

    @property
    def starts(self) -> range:
        """The first rows of the blocks."""
        return range(0, len(self._d), self._step)

    @property
    def update_energy(self) -> float:
        """‖s·B·A‖², through the Gram matrices of the factors."""
        return float(((self._b.T @ self._b) * (self._a @ self._a.T)).sum())

    def energies(self, start: int, some: slice = slice(None)) -> np.ndarray:
        """Of each of ``step`` rows from ``start`` on, or of some of these."""
        part, b = (x[start : start + self._step][some] for x in (self._d, self._b))
        return row_energies(part, minus=torch.mm(b, self._a, out=self._buffer[: len(part)]))


def _gram_eigenvectors(d: Tensor) -> _Right:
    gram = torch.zeros(d.shape[1], d.shape[1], dtype=torch.float64, device=d.device)
    for _, block in float64_blocks(d):
        gram.addmm_(block.T, block)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return _Right(vectors.flip(1), eigenvalues.flip(0).clamp(min=0).sqrt())


def _left_from_right(d: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """u = D·v/σ in float64.

    A Gram matrix resolves σ down to about 1e-8·σ₁; below, u is not of length one. Its product
    with σ, which is all that an update needs, is D·v whatever σ is.
    """
    u = torch.cat([block @ v for _, block in float64_blocks(d)])
    safe = torch.where(values > 0, values, torch.ones_like(values))
    return (u / safe).float(), v.float()


def left_signs(u: Tensor) -> Tensor:
    """(k,): ±1, such that the largest entry of each column of u (m, k) becomes positive."""
    if not u.numel():
        return u.new_ones(u.shape[1])
    top = u.abs().argmax(dim=0, keepdim=True)
    return torch.where(u.gather(0, top)[0] < 0, -1.0, 1.0).to(u)


def _with_fixed_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    signs = left_signs(u)
    return u * signs, v * signs
