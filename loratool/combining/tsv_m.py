"""TSV-M: the singular vectors of all updates, made orthogonal to each other."""

from __future__ import annotations

import torch

from loratool.algebra.frames import polar
from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import LAMBDA
from loratool.combining.method import Space, Updates, method
from loratool.combining.spectral import contributing, nothing, singular_triplets


@method(
    "tsv_m",
    space=Space.FACTORS,
    source="Gargiulo et al. 2024, Task Singular Vectors, arXiv 2412.00081: with "
    "U = [U₁ … U_N] = P·D·Qᵀ and the same for V, the result is (PQᵀ)·Σ·(P'Q'ᵀ)ᵀ",
    cost="O((m+n)·R² + R³)",
    weights="multiply the singular values",
    parameters=(LAMBDA,),
    notes="Of each update the first min(m, n)/N triplets are kept, as in the paper; of low-rank "
    "updates those are usually all. N counts the adapters that change the weight. "
    "Directions that depend on each other get the nearest partial isometry.",
)
def tsv_m(updates: Updates, *, lambda_: float) -> LowRank:
    """All singular vectors side by side, decorrelated, with the singular values they had."""
    values = contributing(updates)
    if not values:
        return nothing(updates)
    most = max(1, min(updates.shape) // len(values))
    triplets = [singular_triplets(value, most) for value in values]
    u = polar(torch.cat([u for u, _, _ in triplets], dim=1))
    v = polar(torch.cat([v for _, _, v in triplets], dim=1))
    sigma = torch.cat([sigma for _, sigma, _ in triplets])
    return LowRank(u * sigma, v.T, lambda_)
