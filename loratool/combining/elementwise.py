"""What the elementwise methods share: declared parameters, pruning, electing signs, summing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratool.algebra.counter import uniform
from loratool.algebra.row_blocks import RowBlocks, dense, magnitudes_at, map_rows
from loratool.combining.method import Parameter, Updates, Value

DENSITY = Parameter(
    "density", float, 0.5, "Share of each update's elements that is kept.", low=0, high=1,
    open_low=True,
)  # fmt: skip
LAMBDA = Parameter("lambda", float, 1.0, "Multiplies the combined update.")
NORMALIZE = Parameter(
    "normalize", bool, True, "Divide by the sum of the weights (for ties: of those that agree)."
)
MAJORITY = Parameter(
    "majority",
    str,
    "total",
    "Elect signs by the sum of the values (total) or by counting signs (frequency).",
    choices=("total", "frequency"),
)


def with_default(parameter: Parameter, default: Value) -> Parameter:
    """The same parameter with another default."""
    return replace(parameter, default=default)


def dense_updates(updates: Updates) -> list[RowBlocks]:
    """Every adapter's update, unweighted, by blocks of rows."""
    return [dense(update) for update in updates.updates]


def keep_largest(matrix: RowBlocks, density: float) -> RowBlocks:
    """All but the largest ``density`` of the elements set to zero; equal ones are kept together."""
    count = matrix.shape[0] * matrix.shape[1]
    kept = max(1, int(density * count))
    if kept >= count:
        return matrix
    least = magnitudes_at(matrix, [count - kept])[0]
    return map_rows([matrix], lambda _, block: torch.where(block.abs() >= least, block, 0.0))


def weighted_sum(matrices: Sequence[RowBlocks], weights: Sequence[float]) -> RowBlocks:
    """Σ wᵢ·Mᵢ, summed in float64."""

    def add(_: int, *blocks: Tensor) -> Tensor:
        total = torch.zeros_like(blocks[0], dtype=torch.float64)
        for block, weight in zip(blocks, weights, strict=True):
            total += weight * block.double()
        return total.float()

    return map_rows(matrices, add)


def agreeing_sum(
    matrices: Sequence[RowBlocks],
    weights: Sequence[float],
    *,
    majority: str,
    normalize: bool,
    factor: float,
) -> RowBlocks:
    """λ·Σ wᵢMᵢ over those whose sign is the elected one; ``normalize`` divides by their weights.

    The elected sign of an element is that of Σ wᵢMᵢ, or of Σ sign(wᵢMᵢ); positive where it is
    zero. Zeros agree with nothing.
    """

    def add(_: int, *blocks: Tensor) -> Tensor:
        values = [weight * block.double() for weight, block in zip(weights, blocks, strict=True)]
        votes = values if majority == "total" else [value.sign() for value in values]
        total = sum_of_agreeing(values, weights, elect(votes), normalize=normalize)
        return (factor * total).float()

    return map_rows(matrices, add)


def elect(votes: Sequence[Tensor]) -> Tensor:
    """The sign of Σ votes, positive where that is zero; float64."""
    return torch.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0).double()


def sum_of_agreeing(
    values: Sequence[Tensor], weights: Sequence[float], elected: Tensor, *, normalize: bool
) -> Tensor:
    """Σ of the values with the elected sign; ``normalize`` divides by the sum of their weights."""
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for value, weight in zip(values, weights, strict=True):
        agrees = value.sign() == elected
        total += torch.where(agrees, value, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total


def drop_at_random(matrix: RowBlocks, density: float, key: str) -> RowBlocks:
    """Each element kept with probability ``density``, and then divided by it."""
    if density >= 1:
        return matrix
    columns = matrix.shape[1]

    def drop(start: int, block: Tensor) -> Tensor:
        chance = uniform(start, start + len(block), columns, key, block.device)
        return torch.where(chance < density, block / density, 0.0)

    return map_rows([matrix], drop)
