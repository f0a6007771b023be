"""How far a randomised truncation can be from the optimum.

With V (n, l) orthonormal, D·V = U·Θ (the Ritz values), and E = D − D·V·Vᵀ, the Gram matrix of D
in the basis [V, V⊥] has the blocks Θ², Gᵀ with G = Eᵀ·U·Θ, and a last block that is at most η·I
for any η ≥ ‖E‖₂². With the thin factor R of G,

    T = [[Θ², Rᵀ], [R, η·I]]   ⇒   σᵢ² ≤ max(λᵢ(T), η),

so the squared error of the best rank-k matrix is at least L = ‖D‖² − Σ_{i≤k} max(λᵢ(T), η).

Where the spectrum falls fast, η = ‖E‖²_F = ‖D‖² − ΣΘ² does, and is certain. Otherwise η comes
from random probes and power steps (Halko, Martinsson and Tropp, 2011, Lemma 4.1): with t probes it
fails with probability at most α⁻ᵗ. Bounds after several numbers of steps may fail each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.passes import image_and_back
from loratool.algebra.random import gaussian

PROBES = 16
ALPHA = math.sqrt(10)
POWER_STEPS = (2, 3, 5, 10)
"""Steps after which η is taken; the later ones only while the bound is loose."""

LOOSE = 2e-3
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


def excess_bound(
    d: Tensor, theta: Tensor, v: Tensor, back: Tensor, rank: int, energy: float, key: str
) -> ExcessBound:
    """Bound the excess of the first ``rank`` of the Ritz pairs (theta, v) of ``d``.

    d: (m, n) float32. theta: (l,) float64. v: (n, l) with orthonormal columns to float32. back:
    DᵀD·v, float64. energy: ‖d‖²_F.
    """
    if energy == 0:
        return EXACT
    g = back - v.double() * theta.square()
    # any R with RᵀR = GᵀG serves; this one costs less than a QR of the tall G
    square, vectors = torch.linalg.eigh(g.T @ g)
    r = square.clamp(min=0).sqrt()[:, None] * vectors.T
    rest = max(0.0, energy - float(theta.square().sum())) + _rounding(len(theta), energy)
    best, failure = _excess(theta, r, rest, rank, energy), 0.0
    if best > LOOSE:
        for norm in _residual_norm_bounds(d, v, key):
            failure += ALPHA**-PROBES
            best = min(best, _excess(theta, r, norm**2, rank, energy))
            if best <= LOOSE:
                break
    return ExcessBound(best, failure)


def _rounding(size: int, energy: float) -> float:
    """What float32 products of ‖D‖² = energy with ``size`` columns err by, padded fourfold."""
    return 4 * math.sqrt(size) * 2.0**-24 * energy


def _excess(theta: Tensor, r: Tensor, eta: float, rank: int, energy: float) -> float:
    size, extra = len(theta), r.shape[0]
    t = torch.zeros(size + extra, size + extra, dtype=torch.float64, device=r.device)
    t[:size, :size] = torch.diag(theta.square())
    t[size:, :size] = r
    t[:size, size:] = r.T
    t[size:, size:] = eta * torch.eye(extra, dtype=torch.float64, device=r.device)
    largest = torch.linalg.eigvalsh(t).flip(0)[:rank].clamp(min=eta)
    padding = _rounding(size, energy)
    missed = max(0.0, energy - float(theta[:rank].square().sum())) + padding
    least = max(0.0, energy - float(largest.sum()) - padding)
    if least >= NEGLIGIBLE**2 * energy:
        return math.sqrt(missed / least) - 1
    return (math.sqrt(missed) - math.sqrt(least)) / math.sqrt(energy)


def _residual_norm_bounds(d: Tensor, v: Tensor, key: str) -> Iterator[float]:
    """Ever tighter bounds on ‖D − D·V·Vᵀ‖₂, each failing with probability α⁻ᵗ."""
    block = _project_out(gaussian(d.shape[1], PROBES, f"{key}:probe").to(d.device), v)
    growth = 0.0  # log of what the probes were divided by
    for step in range(1, max(POWER_STEPS) + 1):
        image, back = image_and_back(d, block)
        if step - 1 in POWER_STEPS:
            yield _norm_from_probes(image, growth, step - 1)
        block = _project_out(back, v)
        scale = float(block.abs().max())
        if scale == 0:
            yield 0.0
            return
        block = block / scale
        growth += math.log(scale)
    yield _norm_from_probes(image_and_back(d, block)[0], growth, max(POWER_STEPS))


def _norm_from_probes(image: Tensor, growth: float, steps: int) -> float:
    largest = float(torch.linalg.vector_norm(image.double(), dim=0).max())
    if largest == 0:
        return 0.0
    log = math.log(ALPHA * math.sqrt(2 / math.pi) * largest) + growth
    return math.exp(log / (2 * steps + 1)) * (1 + 1e-4)


def _project_out(block: Tensor, v: Tensor) -> Tensor:
    for _ in range(2):  # once more removes what rounding left
        block = block - v @ (v.T @ block)
    return block
