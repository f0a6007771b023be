"""DELLA: like DARE, but large elements of a row are more likely to stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loratool.algebra.counter import uniform
from loratool.algebra.row_blocks import RowBlocks, map_rows
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    MAJORITY,
    NORMALIZE,
    agreeing_sum,
    dense_updates,
    with_default,
)
from loratool.combining.method import Parameter, Space, Updates, Value, method
from loratool.errors import UsageError

EPSILON = Parameter(
    "epsilon",
    float,
    0.15,
    "How far the chance to keep an element varies within its row: density ± epsilon.",
    low=0,
    high=0.5,
    open_high=True,
)


def check(parameters: Mapping[str, Value]) -> None:
    """Every chance must be a chance. Raises UsageError."""
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise UsageError(
            f"density {density:g} with epsilon {epsilon:g}: density ± epsilon must lie between 0 "
            "and 1"
        )


@method(
    "della",
    space=Space.DENSE,
    source="Deep et al. 2024, DELLA-Merging, arXiv 2406.11617, MagPrune (section 3.1) with an "
    "elected sign; a row's k-th smallest of n elements is kept with probability "
    "density − ε + 2ε·(k−1)/(n−1) and divided by it",
    cost="a sort of every row of every update per pass of the randomised factorisation",
    weights="multiply the thinned updates before signs are elected",
    is_sum=True,
    parameters=(DENSITY, EPSILON, LAMBDA, with_default(NORMALIZE, False), MAJORITY),
    validate=check,
    notes="Masks as in dare_linear.",
)
def della(
    updates: Updates,
    *,
    density: float,
    epsilon: float,
    lambda_: float,
    normalize: bool,
    majority: str,
) -> RowBlocks:
    """Drop elements at random, small ones sooner; elect a sign, add up those that agree."""
    thinned = [
        _magnitude_drop(matrix, density, epsilon, updates.key(i))
        for i, matrix in enumerate(dense_updates(updates))
    ]
    return agreeing_sum(
        thinned, updates.weights, majority=majority, normalize=normalize, factor=lambda_
    )


def _magnitude_drop(matrix: RowBlocks, density: float, epsilon: float, key: str) -> RowBlocks:
    if density >= 1:
        return matrix
    columns = matrix.shape[1]

    def drop(start: int, block: Tensor) -> Tensor:
        order = block.abs().argsort(dim=1, stable=True)
        places = torch.arange(columns, dtype=torch.float64, device=block.device)
        spread = 2 * epsilon * places / (columns - 1) - epsilon if columns > 1 else 0 * places
        kept = torch.empty_like(block, dtype=torch.float64)
        kept.scatter_(1, order, (density + spread).expand(len(block), columns))
        chance = uniform(start, start + len(block), columns, key, block.device)
        return torch.where(chance < kept, block / kept, 0.0).float()

    return map_rows([matrix], drop)
