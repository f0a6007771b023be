"""What the methods on singular vectors share."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.algebra.row_blocks import RowBlocks
from loratool.algebra.truncation import total, truncate
from loratool.combining.method import Combined, Parameter, Updates

COMPONENTS = Parameter(
    "components",
    int,
    0,
    "Rank of the result; 0 for the method's own choice.",
    low=0,
)


def contributing(updates: Updates) -> list[LowRank]:
    """The weighted updates that are not zero; an adapter counts where it changes something."""
    return [value for value in updates.weighted if value.norm()]


def nothing(updates: Updates) -> LowRank:
    """The update of rank 0."""
    rows, columns = updates.shape
    b = torch.zeros(rows, 0, dtype=torch.float64)
    return LowRank(b, b.new_zeros(0, columns))


def singular_triplets(value: LowRank, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """u (m, k), σ (k,), v (n, k) of the numerically nonzero part of a sum, float64, signs fixed.

    Numerically: against the size of what was added up (see ``truncation``).
    """
    cut = truncate(value, lambda spectrum: len(spectrum.values) if rank is None else rank)
    root = cut.spectrum.values[: cut.value.rank].sqrt().to(cut.value.b)
    return cut.value.b / root, root.square(), (cut.value.a / root[:, None]).T


def of_sum(values: list[LowRank], rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``singular_triplets`` of Σ ΔWᵢ."""
    return singular_triplets(total(values), rank)


def as_blocks(matrix: Tensor) -> RowBlocks:
    """A small matrix in the form that the elementwise rules take."""
    values = matrix.float()
    return RowBlocks(
        (values.shape[0], values.shape[1]), values.device, lambda start, stop: values[start:stop]
    )


def gathered(combined: Combined) -> Tensor:
    """The whole of a small matrix, float64."""
    if isinstance(combined, LowRank):
        return combined.dense()
    return torch.cat([block for _, block in combined]).double()
