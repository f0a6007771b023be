"""Singular values of one matrix, with the energy of those that were not resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PRODUCTS = 1e-7
"""Of the largest singular value: what float32 products put into the others; 4e-8 was measured.
Matters for checkpoints in float32, whose rounding is as small."""


@dataclass(frozen=True)
class Spectrum:
    """The largest singular values of a matrix D.

    values: (k,) float64, descending. total_energy: ‖D‖²_F, of which Σ values² is the resolved
    part. shape: D's (rows, columns). noise_floor: values below it cannot be told from the
    rounding of D's operands (see ``noise``); zero when nothing is known of it. cut: what follows
    these values is zero, and rules that look at all values take these for all.
    """

    values: Tensor
    total_energy: float
    shape: tuple[int, int]
    noise_floor: float = 0.0
    cut: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every singular value is there."""
        return len(self.values) >= min(self.shape)

    @property
    def decides_all(self) -> bool:
        """Whether a rule that looks at every value may take these for all."""
        return self.is_complete or self.cut

    @property
    def norm(self) -> float:
        """‖D‖_F."""
        return float(self.total_energy**0.5)

    def above(self, floor: float) -> Tensor:
        """(k,): which values are above a noise floor and what float32 products add to it."""
        if not floor or not len(self.values):
            return self.values > floor
        return self.values > math.hypot(floor, _PRODUCTS * float(self.values[0]))

    def energy_share(self) -> Tensor:
        """(k,): share of ‖D‖²_F that the first 1, 2, … k components hold, at most 1."""
        if self.total_energy == 0:
            return torch.ones_like(self.values)
        return (self.values.square().cumsum(0) / self.total_energy).clamp(max=1.0)

    def energy_at(self, rank: int) -> float:
        """Share of ‖D‖²_F held by the first ``rank`` components."""
        if rank <= 0 or len(self.values) == 0:
            return 0.0
        return float(self.energy_share()[min(rank, len(self.values)) - 1])

    def first_rank_where(self, holds: Tensor) -> int | None:
        """Smallest k whose k-th entry of ``holds`` is true; None when the resolved part ends first.

        A complete spectrum always answers: with all its values when nothing holds.
        """
        hits = torch.nonzero(holds)
        if len(hits):
            return int(hits[0]) + 1
        return len(self.values) if self.is_complete else None

    def stable_rank(self) -> float:
        """‖D‖²_F / σ₁² (Rudelson and Vershynin, 2007)."""
        top = float(self.values[0]) if len(self.values) else 0.0
        return self.total_energy / top**2 if top else 0.0

    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ over the resolved values (Roy and Vetterli, 2007, eq. 3)."""
        positive = self.values[self.values > 0]
        if not len(positive):
            return 0.0
        shares = positive / positive.sum()
        return float(torch.exp(-(shares * shares.log()).sum()))

    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴ over the resolved values."""
        energy = self.values.square()
        fourth = float(energy.square().sum())
        return float(energy.sum()) ** 2 / fourth if fourth else 0.0
