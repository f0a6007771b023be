"""The best approximation of the sum."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.algebra.truncation import total
from loratool.combining.method import Space, Updates, method


@method(
    "svd",
    space=Space.CORE,
    source="Eckart and Young 1936, on the core of the stacked factors: with [w₁s₁B₁ | …] = Q_B·R_B "
    "and [A₁; …]ᵀ = Q_A·R_A the sum is Q_B·(R_B·R_Aᵀ)·Q_Aᵀ",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates; negative ones subtract",
    is_sum=True,
)
def svd(updates: Updates) -> LowRank:
    """The weighted sum, cut to the rank asked for with the least possible error."""
    return total(updates.weighted)
