"""All factors side by side."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.algebra.truncation import total
from loratool.combining.method import Space, Updates, method


@method(
    "cat",
    space=Space.FACTORS,
    source="block matrices: Σ wᵢsᵢBᵢAᵢ = [w₁s₁B₁ | w₂s₂B₂ | …]·[A₁; A₂; …]",
    cost="copies the factors",
    weights="multiply the updates; negative ones subtract",
    keeps_rank=True,
    is_sum=True,
    notes="A single adapter at weight 1 keeps its bytes. Takes no --rank: svd does.",
)
def cat(updates: Updates) -> LowRank:
    """The exact weighted sum; ranks add up."""
    present = [update for update in updates.weighted if update.rank and update.scale]
    return total(present or updates.weighted[:1])
