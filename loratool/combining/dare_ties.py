"""DARE with an elected sign."""

from __future__ import annotations

from loratool.algebra.row_blocks import RowBlocks
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    MAJORITY,
    NORMALIZE,
    agreeing_sum,
    dense_updates,
    drop_at_random,
    with_default,
)
from loratool.combining.method import Space, Updates, method


@method(
    "dare_ties",
    space=Space.DENSE,
    source="Yu et al. 2024, DARE, arXiv 2311.03099, eq. 3–4, then the election and disjoint sum of "
    "TIES (arXiv 2306.01708)",
    cost="one pass over every update's m·n elements per pass of the randomised factorisation",
    weights="multiply the thinned updates before signs are elected",
    is_sum=True,
    parameters=(DENSITY, LAMBDA, with_default(NORMALIZE, False), MAJORITY),
    notes="Masks as in dare_linear.",
)
def dare_ties(
    updates: Updates, *, density: float, lambda_: float, normalize: bool, majority: str
) -> RowBlocks:
    """Drop elements at random, elect a sign for each, add up the updates that agree with it."""
    thinned = [
        drop_at_random(matrix, density, updates.key(i))
        for i, matrix in enumerate(dense_updates(updates))
    ]
    return agreeing_sum(
        thinned, updates.weights, majority=majority, normalize=normalize, factor=lambda_
    )
