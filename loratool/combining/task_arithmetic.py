"""The weighted sum of the updates, times λ."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import LAMBDA
from loratool.combining.method import Space, Updates, linear_combination, method


@method(
    "task_arithmetic",
    space=Space.FACTORS,
    source="Ilharco et al. 2023, arXiv 2212.04089, section 2: τ = λ·Σ wᵢτᵢ",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates; negative ones subtract",
    is_sum=True,
    parameters=(LAMBDA,),
)
def task_arithmetic(updates: Updates, *, lambda_: float) -> LowRank:
    """The weighted sum of the updates, times lambda."""
    return linear_combination(updates.weighted, [lambda_] * len(updates.updates))
