"""Iso-CTS: Iso-C with directions set aside for what each update has alone."""

from __future__ import annotations

import torch

from loratool.algebra.frames import polar
from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import LAMBDA
from loratool.combining.method import Parameter, Space, Updates, method
from loratool.combining.spectral import (
    COMPONENTS,
    contributing,
    nothing,
    of_sum,
    singular_triplets,
)

COMMON = Parameter(
    "common",
    float,
    0.8,
    "Share of the result's directions that come from the sum; the rest is divided equally.",
    low=0,
    high=1,
)


@method(
    "iso_cts",
    space=Space.CORE,
    source="Marczak et al. 2025, No Task Left Behind, arXiv 2502.04959: leading "
    "directions of the sum, leading ones of each ΔWᵢ − U_c·U_cᵀ·ΔWᵢ, orthogonalised, all with the "
    "mean of their singular values",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates",
    parameters=(COMPONENTS, COMMON, LAMBDA),
    keeps_rank=True,
    notes="--components stands for min(m, n) in the paper; by default the rank of the sum. N "
    "counts the adapters that change the weight. Takes no --rank, as iso_c.",
)
def iso_cts(updates: Updates, *, components: int, common: float, lambda_: float) -> LowRank:
    """Leading directions of the sum and of what it leaves of each update, all equally strong."""
    values = contributing(updates)
    if not values:
        return nothing(updates)
    u, sigma, v = of_sum(values)
    directions = min(components or len(sigma), *updates.shape)
    own = round((directions - int(directions * common)) / len(values))
    shared = directions - own * len(values)
    found = [(u[:, :shared], sigma[:shared], v[:, :shared])]
    for value in values if own else ():
        b = value.b.double()
        rest = LowRank(b - found[0][0] @ (found[0][0].T @ b), value.a, value.scale)
        found.append(singular_triplets(rest, own))
    strength = torch.cat([values for _, values, _ in found])
    if not len(strength):
        return nothing(updates)
    left = polar(torch.cat([u for u, _, _ in found], dim=1))
    right = polar(torch.cat([v for _, _, v in found], dim=1))
    return LowRank(left, right.T, lambda_ * float(strength.mean()))
