"""What happens to single entries of several updates when they are combined.

These figures are not functions of the small cores, so entries are looked at: all of them in a
small matrix, those of randomly chosen whole rows in a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.algebra.random import choose


@dataclass(frozen=True)
class Entries:
    """The same entries of several updates. values: (updates, entries) float64."""

    values: Tensor
    total: int

    @property
    def looked_at(self) -> int:
        return self.values.shape[1]

    @property
    def is_sample(self) -> bool:
        """Whether there are entries that were not looked at."""
        return self.looked_at < self.total


def read_entries(updates: Sequence[LowRank], at_most: int, key: str) -> Entries:
    """All entries of updates of one shape, or whole rows of about ``at_most``, chosen by ``key``.

    At least one row. Memory: 8 bytes per entry and update.
    """
    rows, columns = updates[0].shape
    count = max(1, min(rows, at_most // max(columns, 1)))
    if count == rows:
        picked = updates
    else:
        chosen = choose(rows, count, key)
        picked = [LowRank(update.b[chosen], update.a, update.scale) for update in updates]
    return Entries(torch.stack([update.dense().flatten() for update in picked]), rows * columns)


def sign_agreement(x: Tensor, y: Tensor) -> float | None:
    """Share of entries with equal sign among those nonzero in both; None where there are none."""
    product = torch.sign(x) * torch.sign(y)
    both = int((product != 0).sum())
    return int((product > 0).sum()) / both if both else None


@dataclass(frozen=True)
class Trimming:
    """What TIES leaves of each update, as shares of its own energy.

    kept: after trimming to the largest entries. survives: of those, what agrees with the elected
    sign. None for an update whose entries are all zero.
    """

    kept: tuple[float | None, ...]
    survives: tuple[float | None, ...]


def ties_survival(values: Tensor, density: float) -> Trimming:
    """TIES' steps 1 and 2 (Yadav et al., 2023, Algorithm 1) on (updates, entries), weights all 1.

    Trim each update to its ``density`` largest entries by size, then elect per entry the sign of
    the sum of what is left.
    """
    size = values.abs()
    count = max(1, round(density * values.shape[1]))
    threshold = torch.topk(size, count, dim=1, sorted=True).values[:, -1:]
    trimmed = torch.where(size >= threshold, values, 0.0)
    elected = torch.sign(trimmed.sum(dim=0))
    agreeing = torch.where(torch.sign(trimmed) == elected, trimmed, 0.0)
    energy = values.square().sum(dim=1).tolist()
    kept = trimmed.square().sum(dim=1).tolist()
    survives = agreeing.square().sum(dim=1).tolist()
    return Trimming(
        tuple(k / e if e else None for k, e in zip(kept, energy, strict=True)),
        tuple(s / e if e else None for s, e in zip(survives, energy, strict=True)),
    )
