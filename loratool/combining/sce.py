"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loratool.algebra.row_blocks import RowBlocks, magnitudes_at, map_rows
from loratool.combining.elementwise import DENSITY, dense_updates, elect, sum_of_agreeing
from loratool.combining.method import Space, Updates, method

_SELECT = replace(
    DENSITY, default=1.0, help="Share of the elements, those that vary most, that is kept."
)


@method(
    "sce",
    space=Space.DENSE,
    source="Wan et al. 2024, FuseChat, arXiv 2408.07990, section 3.3 (select, calculate, erase)",
    cost="four passes over every update's m·n elements, then a randomised factorisation",
    weights="multiply the updates; how much each counts is then decided by its energy",
    parameters=(_SELECT,),
)
def sce(updates: Updates, *, density: float) -> RowBlocks:
    """Keep what varies most between the updates; average those of the elected sign by energy."""
    scaled = [
        map_rows([matrix], lambda _, block, w=weight: (w * block.double()).float())
        for matrix, weight in zip(dense_updates(updates), updates.weights, strict=True)
    ]
    variance = map_rows(scaled, lambda _, *blocks: _variance(blocks))
    least = _least_selected(variance, density)
    energies = torch.zeros(len(scaled), dtype=torch.float64)
    for rows, varies in variance:
        for i, matrix in enumerate(scaled):
            block = matrix.rows(rows.start, rows.stop)
            energies[i] += float(torch.where(varies >= least, block, 0.0).double().square().sum())
    total = float(energies.sum())
    shares = (
        energies / total if total else torch.ones(len(scaled), dtype=torch.float64) / len(scaled)
    ).tolist()

    def erase(_: int, *blocks: Tensor) -> Tensor:
        selected = _variance(blocks) >= least
        values = [torch.where(selected, block, 0.0).double() for block in blocks]
        counted = [share * value for share, value in zip(shares, values, strict=True)]
        return sum_of_agreeing(counted, shares, elect(values), normalize=True).float()

    return map_rows(scaled, erase)


def _variance(blocks: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([block.double() for block in blocks]).var(dim=0, unbiased=False).float()


def _least_selected(variance: RowBlocks, density: float) -> float:
    """The smallest variance that is selected: the k-th largest, k a share of those above zero."""
    if density >= 1:
        return 0.0
    count = variance.shape[0] * variance.shape[1]
    varying = sum(int(torch.count_nonzero(block)) for _, block in variance)
    kept = int(varying * density)
    return magnitudes_at(variance, [count - kept])[0] if kept else float("inf")
