"""The weighted sum of the updates' largest elements."""

from __future__ import annotations

from loratool.algebra.row_blocks import RowBlocks
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    dense_updates,
    keep_largest,
    weighted_sum,
)
from loratool.combining.method import Space, Updates, method


@method(
    "magnitude_prune",
    space=Space.DENSE,
    source="the trimming step of TIES-Merging (arXiv 2306.01708) with a plain sum, as in PEFT",
    cost="three passes over every update's m·n elements, then a randomised factorisation",
    weights="multiply the pruned updates",
    is_sum=True,
    parameters=(DENSITY, LAMBDA),
)
def magnitude_prune(updates: Updates, *, density: float, lambda_: float) -> RowBlocks:
    """Keep the largest elements of each update and add them up."""
    pruned = [keep_largest(matrix, density) for matrix in dense_updates(updates)]
    return weighted_sum(pruned, [lambda_ * weight for weight in updates.weights])
