"""The methods written again from their papers, plainly, on whole matrices in float64.

Nothing here comes from the package, so that a mistake would have to be made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reference = Callable[..., Tensor]


def top_share(delta: Tensor, density: float) -> Tensor:
    """All but the largest share of the elements set to zero."""
    count = delta.numel()
    kept = max(1, int(density * count))
    least = delta.abs().flatten().sort(descending=True).values[kept - 1]
    return delta * (delta.abs() >= least)


def elected(values: list[Tensor], majority: str = "total") -> Tensor:
    votes = torch.stack(values if majority == "total" else [value.sign() for value in values])
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0).double()


def agreeing(values: list[Tensor], weights: list[float], majority: str, normalize: bool) -> Tensor:
    sign = elected(values, majority)
    total = torch.zeros_like(values[0])
    count = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += value * (value.sign() == sign)
        count += weight * (value.sign() == sign)
    return total / torch.where(count == 0, 1.0, count) if normalize else total


def weighted(deltas: list[Tensor], weights: list[float]) -> list[Tensor]:
    return [delta * weight for delta, weight in zip(deltas, weights, strict=True)]


def plain_sum(deltas: list[Tensor], weights: list[float], **_: Any) -> Tensor:
    return torch.stack(weighted(deltas, weights)).sum(0)


def linear(deltas: list[Tensor], weights: list[float], *, normalize: bool = True) -> Tensor:
    return plain_sum(deltas, weights) / (sum(weights) if normalize else 1)


def task_arithmetic(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    return given.get("lambda", 1.0) * plain_sum(deltas, weights)


def ties(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    trimmed = [top_share(delta, given.get("density", 0.2)) for delta in deltas]
    merged = agreeing(
        weighted(trimmed, weights),
        weights,
        given.get("majority", "total"),
        given.get("normalize", True),
    )
    return given.get("lambda", 1.0) * merged
