"""DARE with a plain sum."""

from __future__ import annotations

from loratool.algebra.row_blocks import RowBlocks
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    dense_updates,
    drop_at_random,
    weighted_sum,
)
from loratool.combining.method import Space, Updates, method


@method(
    "dare_linear",
    space=Space.DENSE,
    source="Yu et al. 2024, DARE, arXiv 2311.03099, eq. 3–4: drop with p = 1 − density, divide by "
    "1 − p",
    cost="one pass over every update's m·n elements per pass of the randomised factorisation",
    weights="multiply the thinned updates",
    is_sum=True,
    parameters=(DENSITY, LAMBDA),
    notes="The mask of an element depends on the seed, the parameter's name, the adapter's place "
    "in the list and the element's index.",
)
def dare_linear(updates: Updates, *, density: float, lambda_: float) -> RowBlocks:
    """Drop elements at random, enlarge the others to make up for it, and add up."""
    thinned = [
        drop_at_random(matrix, density, updates.key(i))
        for i, matrix in enumerate(dense_updates(updates))
    ]
    return weighted_sum(thinned, [lambda_ * weight for weight in updates.weights])
