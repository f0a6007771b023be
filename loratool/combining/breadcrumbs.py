"""Model Breadcrumbs: neither the smallest nor the very largest elements."""

from __future__ import annotations

import torch

from loratool.algebra.row_blocks import RowBlocks, magnitudes_at, map_rows
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    dense_updates,
    weighted_sum,
    with_default,
)
from loratool.combining.method import Parameter, Space, Updates, method

GAMMA = Parameter(
    "gamma", float, 0.01, "Share of each update's largest elements that is removed.", low=0, high=1
)


@method(
    "breadcrumbs",
    space=Space.DENSE,
    source="Davari and Belilovsky 2023, Model Breadcrumbs, arXiv 2312.06795, section 3; density is "
    "what both masks leave, as in mergekit",
    cost="three passes over every update's m·n elements, then a randomised factorisation",
    weights="multiply the masked updates",
    is_sum=True,
    parameters=(with_default(DENSITY, 0.9), GAMMA, LAMBDA),
    notes="Where density + gamma is above 1, fewer of the largest elements are removed.",
)
def breadcrumbs(updates: Updates, *, density: float, gamma: float, lambda_: float) -> RowBlocks:
    """Remove the very largest and the smallest elements of each update and add up the rest."""
    masked = [_middle(matrix, density, gamma) for matrix in dense_updates(updates)]
    return weighted_sum(masked, [lambda_ * weight for weight in updates.weights])


def _middle(matrix: RowBlocks, density: float, gamma: float) -> RowBlocks:
    if density >= 1:
        return matrix
    count = matrix.shape[0] * matrix.shape[1]
    kept = max(1, int(density * count))
    smallest = max(0, count - kept - int(gamma * count))
    low, high = magnitudes_at(matrix, [smallest, smallest + kept - 1])
    return map_rows(
        [matrix],
        lambda _, block: torch.where((block.abs() >= low) & (block.abs() <= high), block, 0.0),
    )
