"""TIES: trim, elect a sign, average those that agree."""

from __future__ import annotations

from loratool.algebra.row_blocks import RowBlocks
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    MAJORITY,
    NORMALIZE,
    agreeing_sum,
    dense_updates,
    keep_largest,
    with_default,
)
from loratool.combining.method import Space, Updates, method


@method(
    "ties",
    space=Space.DENSE,
    source="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, Algorithm 1",
    cost="three passes over every update's m·n elements, then a randomised factorisation",
    weights="multiply the trimmed updates before signs are elected",
    is_sum=True,
    parameters=(with_default(DENSITY, 0.2), LAMBDA, NORMALIZE, MAJORITY),
)
def ties(
    updates: Updates, *, density: float, lambda_: float, normalize: bool, majority: str
) -> RowBlocks:
    """Keep the largest elements, elect a sign for each, average the updates that agree with it."""
    trimmed = [keep_largest(matrix, density) for matrix in dense_updates(updates)]
    return agreeing_sum(
        trimmed, updates.weights, majority=majority, normalize=normalize, factor=lambda_
    )
