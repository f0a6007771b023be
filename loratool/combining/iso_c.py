"""Iso-C: the sum with all its singular values made equal."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import LAMBDA
from loratool.combining.method import Space, Updates, method
from loratool.combining.spectral import COMPONENTS, contributing, nothing, of_sum


@method(
    "iso_c",
    space=Space.CORE,
    source="Marczak et al. 2025, No Task Left Behind, arXiv 2502.04959: "
    "U·(mean σ)·Vᵀ of Σ ΔWᵢ = U·Σ·Vᵀ",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates",
    parameters=(COMPONENTS, LAMBDA),
    keeps_rank=True,
    notes="The mean is over the numerically nonzero singular values that are kept. The paper, "
    "whose updates have full rank, divides their sum by min(m, n); of low-rank updates that would "
    "be smaller by rank / min(m, n). Equal values have no order to cut by, so --components cuts "
    "the sum before it is flattened, and there is no --rank.",
)
def iso_c(updates: Updates, *, components: int, lambda_: float) -> LowRank:
    """The sum with its singular values replaced by their mean."""
    values = contributing(updates)
    if not values:
        return nothing(updates)
    u, sigma, v = of_sum(values, components or None)
    return LowRank(u, v.T, lambda_ * float(sigma.mean()) if len(sigma) else 0.0)
