"""What verify looks at in one tensor, and what it says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from loratool.adapter import Replacement, TokenRows
from loratool.algebra.rounding import MERGEABLE, Rounder
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.ops.rounders import rounder_of
from loratool.receipt import blocks_of
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Stored


class Status(StrEnum):
    """What verify says of one tensor."""

    EQUAL = "equal"
    ROUNDING = "within rounding"
    OFF = "off"
    CHANGED = "changed without an update"
    MISSING = "missing"
    EXTRA = "not in the base"
    SHAPE = "another shape or dtype"


class Cause(StrEnum):
    """What is behind a tensor that is off."""

    NOT_APPLIED = "not applied"
    SUBTRACTED = "subtracted"
    TWICE = "applied twice"
    PART = "one of several is missing"
    SCALE = "wrong scale"
    TRANSPOSED = "transposed"
    VALUES = "some values are off"
    OTHER = "something else"


class Order(StrEnum):
    """Rounding orders that other tools merge in."""

    FLOAT32 = "summed in float32, then cast"
    DELTA = "delta cast first, then added"
    FACTORS = "factors cast first, then summed in float32"
    ALL = "factors cast first, then the delta, then added"
    STEPS = "one adapter summed in float32 and cast after the other"
    STEPS_ALL = "one adapter after the other, its factors cast first, then its delta, then added"


@dataclass(frozen=True)
class AdapterFit:
    """The factor that fits best for one of the adapters, counted from 0, and its ‖ΔW‖²."""

    adapter: int
    fit: float
    energy: float


@dataclass(frozen=True)
class VerifyRow:
    """One tensor. Counts are of elements; ``checked`` of ``elements`` were compared.

    different: not the correctly rounded value. beyond: off by more than a unit in the last place
    of the largest of base weight, update and result (and by more than a merge calculated in float32
    may be, where that is stored). worst: the largest difference, worst_at where.
    fit: the factor of the update that fits best, ⟨W′ − W0, ΔW⟩/‖ΔW‖² where that is not spoilt by
    rounding. fits: where several adapters meet, the factor of each, by least squares over all of
    them. residual: ‖W′ − W0 − Σ fit·ΔW‖ / ‖W′ − W0‖. order: the rounding order that explains the
    differences. delta_energy: ‖ΔW‖².
    """

    name: str
    update: str
    status: Status
    elements: int
    checked: int
    different: int = 0
    beyond: int = 0
    worst: float = 0.0
    worst_at: tuple[int, ...] = ()
    fit: float | None = None
    fits: tuple[AdapterFit, ...] = ()
    residual: float | None = None
    order: Order | None = None
    cause: Cause | None = None
    delta_energy: float = 0.0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        found = dict(vars(self)) | {"worst_at": list(self.worst_at)}
        return found | {"fits": [dict(vars(fit)) for fit in self.fits]}


@dataclass(frozen=True)
class VerifyJob:
    """A tensor to check. rows: only these (sorted), or None for all. scaled: of one in 8 bits."""

    name: str
    base: Stored
    merged: TensorInfo
    updates: tuple[PlacedUpdate, ...]
    update: str
    device: torch.device
    rows: tuple[int, ...] | None = None
    scaled: ScaledBy | None = None

    @property
    def cost(self) -> int:
        whole = self.merged.nbytes
        return whole if self.rows is None else whole * len(self.rows) // max(1, self.merged.rows)

    @property
    def elements(self) -> int:
        return self.merged.numel

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The row ranges to look at."""
        if self.rows is None:
            yield from blocks_of(self.base.shape)
        else:
            yield from ((row, row + 1) for row in self.rows)

    def rounder(self) -> Rounder:
        """What the updates make of the base."""
        rows = self.base.rows
        return rounder_of(self.updates, self.base, 0, rows, device=self.device, scaled=self.scaled)

    @property
    def is_comparable(self) -> bool:
        """Whether it is known what the update makes of the base in the merged tensor's dtype."""
        replaced = all(isinstance(one.update, Replacement | TokenRows) for one in self.updates)
        if self.scaled is not None:
            return self.merged.dtype == self.base.dtype
        return replaced or self.merged.dtype.torch in MERGEABLE
