"""The weighted mean of the updates."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import NORMALIZE
from loratool.combining.method import Space, Updates, linear_combination, method
from loratool.errors import DisagreementError


@method(
    "linear",
    space=Space.FACTORS,
    source="Wortsman et al. 2022, model soups, arXiv 2203.05482, on the updates",
    cost="O((m+n)·R² + R³)",
    weights="divided by their sum, unless normalize is off",
    is_sum=True,
    parameters=(NORMALIZE,),
)
def linear(updates: Updates, *, normalize: bool) -> LowRank:
    """The weighted mean of the updates: Σ wᵢ·ΔWᵢ / Σ wᵢ."""
    divisor = sum(updates.weights) if normalize else 1.0
    if divisor == 0:
        raise DisagreementError(
            f"{updates.name}: the weights add up to zero, so they cannot be normalised",
            hint="use task_arithmetic or svd for differences",
        )
    return linear_combination(updates.weighted, [1 / divisor] * len(updates.updates))
