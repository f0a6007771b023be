"""How far a randomised truncation can be from the optimum.

With V (n, l) orthonormal, D·V = U·Θ (the Ritz values), and E = D − D·V·Vᵀ, the Gram matrix of D
in the basis [V, V⊥] has the blocks Θ², Gᵀ with G = Eᵀ·U·Θ, and a last block that is at most η·I
for any η ≥ ‖E‖₂². With the thin factor R of G,

    T = [[Θ², Rᵀ], [R, η·I]]   ⇒   σᵢ² ≤ max(λᵢ(T), η),

so the squared error of the best rank-k matrix is at least L = ‖D‖² − Σ_{i≤k} max(λᵢ(T), η). It is
held against the error of the factors themselves, ‖D‖² less the squares of their singular values.

Where the spectrum falls fast, η = ‖E‖²_F = ‖D‖² − ΣΘ² does, and is certain. Otherwise η comes
from random probes ω and power steps: ‖B‖₂ ≤ α·√(2/π)·max‖B·ω‖ (Halko, Martinsson and Tropp, 2011,
Lemma 4.1), here of B = (EᵀE)^q, fails with probability at most α⁻ᵗ for t probes. Bounds after
several numbers of steps may fail each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.krylov import Ritz, residual
from loratool.algebra.passes import image_and_back
from loratool.algebra.random import gaussian

PROBES = 16
ALPHA = math.sqrt(10)
POWER_STEPS = (2, 3, 5, 10)
"""Steps after which η is taken; the later ones only while the bound is loose."""

LOOSE = 5e-3
"""A bound up to this is taken; a tighter one would cost further passes."""

_LOOKED_AT = 16
_JITTER = 1e-13
_TINY = 1e-32

NEGLIGIBLE = 1e-2
"""Below this share of ‖D‖ the optimum is too small to measure an excess against."""


@dataclass(frozen=True)
class ExcessBound:
    """An upper bound on what a truncation misses beyond the optimum.

    excess: (err − opt)/opt where opt is at least 1 % of ‖D‖, else (err − opt)/‖D‖; before the
    rounding of stored factors. failure: the probability that the bound does not hold.
    """

    excess: float
    failure: float


EXACT = ExcessBound(0.0, 0.0)


def excess_bound(d: Tensor, ritz: Ritz, rank: int, energy: float, key: str) -> ExcessBound:
    """Bound the excess of the first ``rank`` of the triplets of ``d`` (m, n), float32.

    energy: ‖d‖²_F.
    """
    if energy == 0:
        return EXACT
    rounding = _Rounding.of(d, ritz, rank, energy)
    gap = _Gap.of(ritz, rank, energy, rounding)
    eta = max(0.0, energy - float(ritz.theta.square().sum())) + rounding.theta
    excess, failure = gap.worth(eta), 0.0
    if excess is None or excess > LOOSE:
        for norm in _residual_norm_bounds(d, ritz.v, key):
            failure += ALPHA**-PROBES
            eta = min(eta, norm**2)
            excess = gap.worth(eta)
            if excess is not None and excess <= LOOSE:
                break
    return ExcessBound(gap.excess(eta) if excess is None else excess, failure)


@dataclass(frozen=True)
class _Rounding:
    """What float32 products err by, padded, in units of ‖D‖²: in Σθ², and in what factors hold.

    Where they err independently of each other it is far below the first figure. Where entries of D
    are alike they round alike, and by how much is measured: in float64, of the rows and columns
    that hold most and of some in between.
    """

    theta: float
    kept: float

    @staticmethod
    def of(d: Tensor, ritz: Ritz, rank: int, energy: float) -> _Rounding:
        independent = 4 * math.sqrt(len(ritz.theta)) * 2.0**-24 * energy
        image = ritz.image.double()
        images = image @ (ritz.project[:, :rank] * ritz.theta[:rank])
        rows = _some(images)
        true = d[rows].double() @ ritz.v[:, :rank].double()
        theta = _erred(images[rows].square() - true.square(), images, rows)
        images = ritz.row @ ritz.mix[:, :rank]
        columns = _some(images)
        true = d[:, columns].double().T @ (image @ (ritz.project @ ritz.mix[:, :rank]))
        kept = _erred(2 * images[columns] * (images[columns] - true), images, columns)
        return _Rounding(max(independent, 2 * theta), max(independent, 2 * kept))


def _some(images: Tensor) -> Tensor:
    """Which rows of ``images`` to look at: the largest, and as many at equal distances."""
    lengths = images.square().sum(1)
    if len(lengths) <= 2 * _LOOKED_AT:
        return torch.arange(len(lengths), device=images.device)
    between = torch.arange(0, len(lengths), len(lengths) // _LOOKED_AT, device=images.device)
    return torch.cat([lengths.topk(_LOOKED_AT).indices, between])


def _erred(errors: Tensor, images: Tensor, some: Tensor) -> float:
    """Σ|error| of the columns' squared lengths, if all rows err as these do. errors: of some."""
    squares = images.square()
    looked_at = squares[some].sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    return float((errors.sum(0) / looked_at * squares.sum(0)).abs().sum())


@dataclass(frozen=True)
class _Gap:
    """What a rank's error is compared with, given a bound η on ‖E‖₂².

    squares: θ² (l,). r: (l, l) with rᵀr ≥ GᵀG. missed: ‖D‖² less what the factors hold, padded.
    rounding: how much less than all of these say the optimum may be.
    """

    squares: Tensor
    r: Tensor
    rank: int
    energy: float
    missed: float
    rounding: float

    @staticmethod
    def of(ritz: Ritz, rank: int, energy: float, rounding: _Rounding) -> _Gap:
        squares = ritz.theta.square()
        g = residual(ritz.back, ritz.v, squares)
        square = g.T @ g
        # a little more than GᵀG, so that it has a Cholesky factor; the bound becomes no tighter
        square.diagonal().add_(_JITTER * float(square.trace()) + _TINY * energy**2)
        kept = float(ritz.values[:rank].square().sum())
        missed = max(0.0, energy - kept) + rounding.kept
        r = torch.linalg.cholesky(square).T
        return _Gap(squares, r, rank, energy, missed, rounding.theta)

    def worth(self, eta: float) -> float | None:
        """``excess``, or None where it is above LOOSE for certain: T's eigenvalues are ≥ θ²."""
        least = self._against(self.squares[: self.rank].clamp(min=eta))
        return self.excess(eta) if least <= LOOSE else None

    def excess(self, eta: float) -> float:
        """The bound on the excess."""
        size, r = len(self.squares), self.r
        t = torch.diag(torch.cat([self.squares, torch.full_like(self.squares, eta)]))
        t[size:, :size] = r
        t[:size, size:] = r.T
        return self._against(torch.linalg.eigvalsh(t).flip(0)[: self.rank].clamp(min=eta))

    def _against(self, largest: Tensor) -> float:
        """The excess if these were the squares of D's first singular values.

        Of the optimum only the least is known, so the larger of both excesses that it may be.
        """
        least = max(0.0, self.energy - float(largest.sum()) - self.rounding)
        of_optimum = math.sqrt(self.missed / max(least, NEGLIGIBLE**2 * self.energy)) - 1
        of_norm = (math.sqrt(self.missed) - math.sqrt(least)) / math.sqrt(self.energy)
        return max(of_optimum, of_norm, 0.0)


def _residual_norm_bounds(d: Tensor, v: Tensor, key: str) -> Iterator[float]:
    """Ever tighter bounds on ‖E‖₂, E = D − D·V·Vᵀ, each failing with probability α⁻ᵗ."""
    block = _project_out(gaussian(d.shape[1], PROBES, f"{key}:probe").to(d.device), v)
    growth = 0.0  # log of what the probes were divided by
    for step in range(1, max(POWER_STEPS) + 1):
        _, back = image_and_back(d, block)
        block = _project_out(back, v)
        if step in POWER_STEPS:
            yield _norm_from_probes(block, growth, step)
        scale = float(block.abs().max())
        if scale == 0:
            yield 0.0
            return
        block = block / scale
        growth += math.log(scale)


def _norm_from_probes(block: Tensor, growth: float, steps: int) -> float:
    """The bound on ‖E‖₂ = ‖(EᵀE)^steps‖₂^(1/2·steps)."""
    largest = float(torch.linalg.vector_norm(block.double(), dim=0).max())
    if largest == 0:
        return 0.0
    log = math.log(ALPHA * math.sqrt(2 / math.pi) * largest) + growth
    return math.exp(log / (2 * steps)) * (1 + 1e-4)


def _project_out(block: Tensor, v: Tensor) -> Tensor:
    for _ in range(2):  # once more removes what rounding left
        block = block - v @ (v.T @ block)
    return block
