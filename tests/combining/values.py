"""Updates to combine, and the whole matrix of what a method gives."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.algebra.row_blocks import RowBlocks
from loratool.combining.method import Combined, Updates
from loratool.combining.registry import find_method


def low_rank(rows: int, columns: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, generator=generator)
    return LowRank(b, torch.randn(rank, columns, generator=generator), scale)


def three(rows: int = 40, columns: int = 24) -> list[LowRank]:
    """Three updates of different ranks, sizes and scales."""
    return [
        low_rank(rows, columns, 2, 1, 0.5),
        low_rank(rows, columns, 5, 2, 2.0),
        low_rank(rows, columns, 3, 3, 1 / 3),
    ]


def whole(combined: Combined) -> Tensor:
    """Float64."""
    if isinstance(combined, RowBlocks):
        return torch.cat([block for _, block in combined]).double()
    return combined.dense()


def run(
    name: str, values: list[LowRank], weights: list[float], seed: int = 0, **given: object
) -> Tensor:
    """What the method makes of one weight, before any cut."""
    method = find_method(name)
    parameters = method.check(given, len(values))
    updates = Updates("layers.0.q.weight", tuple(values), tuple(weights), seed)
    return whole(method(updates, parameters))


def close(one: Tensor, two: Tensor, relative: float = 1e-6) -> bool:
    size = max(float(one.norm()), float(two.norm()))
    return float((one - two).norm()) <= relative * size
