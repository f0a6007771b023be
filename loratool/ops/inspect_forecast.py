"""What merging an adapter would lose to rounding, and how strong it is beside its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.algebra.blocks import all_finite
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import resolve_spectrum
from loratool.algebra.ranks import parse_rank_rule
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NonFiniteValues, NothingMatches, RangeOverflow
from loratool.layouts.patterns import select
from loratool.layouts.placing import PlacedUpdate, TieChoice, place
from loratool.ops.deltas import matrix_shape
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.merge_jobs import BLOCK_ELEMENTS, rounding_energies
from loratool.ops.rounders import rounder_of
from loratool.ops.sources import measurable, open_adapter, open_model
from loratool.plural import counted
from loratool.provenance import document
from loratool.storage.dtypes import BF16, F16, F32
from loratool.storage.tensors import TensorInfo

_FLOATS = (F32, F16, BF16)
OUTPUTS = (BF16, F16)
"""Dtypes that a merge may be stored in and lose by."""


@dataclass(frozen=True)
class ForecastRow:
    """One tensor that the adapter adds to.

    lost_energy: by dtype, ‖M − Y‖²_F of the merged values M in that dtype and the exact ones Y;
    values beyond its range do not count. touched: entries that the update is not zero in;
    swallowed: by dtype, in how many of them M is W itself as that dtype has it: the update is less
    than half a unit in the last place. overflowed: by dtype, how many merged values lie beyond
    its range. update_norm: ‖Y − W‖_F. spectral_norm, base_spectral_norm: largest singular values of
    update and weight, None of a stack of matrices.
    """

    name: str
    dtype: str
    update_norm: float
    base_norm: float
    lost_energy: dict[str, float]
    swallowed: dict[str, int]
    overflowed: dict[str, int]
    touched: int
    spectral_norm: float | None
    base_spectral_norm: float | None

    def lost_share(self, dtype: str) -> float | None:
        """Share of the update's energy that rounding to ``dtype`` makes up; None of no update."""
        return self.lost_energy[dtype] / self.update_norm**2 if self.update_norm else None

    def swallowed_share(self, dtype: str) -> float | None:
        """Share of the update's nonzero entries that ``dtype`` swallows; None of no update."""
        return self.swallowed[dtype] / self.touched if self.touched else None

    @property
    def strength(self) -> float | None:
        """‖ΔW‖₂ / ‖W‖₂; None where it is not known, or the weight is zero."""
        if self.spectral_norm is None or not self.base_spectral_norm:
            return None
        return self.spectral_norm / self.base_spectral_norm

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "update_norm": self.update_norm,
            "base_norm": self.base_norm,
            "lost_share": {dtype: self.lost_share(dtype) for dtype in self.lost_energy},
            "swallowed_share": {dtype: self.swallowed_share(dtype) for dtype in self.swallowed},
            "overflowed": dict(self.overflowed),
            "spectral_norm": self.spectral_norm,
            "base_spectral_norm": self.base_spectral_norm,
            "strength": self.strength,
        }


@dataclass(frozen=True)
class ForecastReport:
    """What a merge of this adapter into this base would do to it."""

    adapter: str
    base: str
    device: str
    rows: tuple[ForecastRow, ...]
    notes: tuple[str, ...]

    def lost_share(self, dtype: str) -> float | None:
        """Of all updates together."""
        energy = sum(row.update_norm**2 for row in self.rows)
        return sum(row.lost_energy[dtype] for row in self.rows) / energy if energy else None

    def swallowed_share(self, dtype: str) -> float | None:
        """Of all updates together."""
        touched = sum(row.touched for row in self.rows)
        return sum(row.swallowed[dtype] for row in self.rows) / touched if touched else None

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "forecast",
            "level": str(Level.VALUES),
            "adapter": self.adapter,
            "base": self.base,
            "device": self.device,
            "lost_share": {dtype.name: self.lost_share(dtype.name) for dtype in OUTPUTS},
            "swallowed_share": {dtype.name: self.swallowed_share(dtype.name) for dtype in OUTPUTS},
            "updates": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }
        return document("inspect", SCHEMA_VERSION, body)


@dataclass(frozen=True)
class _Job:
    base: TensorInfo
    updates: tuple[PlacedUpdate, ...]
    device: torch.device


def forecast(
    adapter: Path,
    base: Path,
    *,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> ForecastReport:
    """Add every additive update to its weight, as merge does, and measure instead of storing.

    only: globs over the base's names. Raises InputError, DisagreementError, NothingMatches where no
    update is additive, UnsupportedInput for a weight that is not a plain float tensor, and
    NonFiniteValues, and RangeOverflow for an update beyond float32.
    """
    target = resolve_device(device)
    value, model = open_adapter(adapter, alpha), open_model(base)
    tensors = model.checkpoint.tensors
    placement = place([(value, 1.0)], tensors, model.config, ties=TieChoice.BOTH)
    chosen = select(list(placement.updates), only, ())
    together = {name: placement.updates[name] for name in placement.updates if name in chosen}
    additive = {
        name: updates
        for name, updates in together.items()
        if all(placed.update.is_additive for placed in updates)
    }
    if not additive:
        raise NothingMatches(
            f"{adapter}: adds to no weight", hint="what it replaces is not rounded"
        )
    rows = (engine or Engine()).map(
        _measure,
        [
            _Job(measurable(tensors[name], _FLOATS), updates, target)
            for name, updates in additive.items()
        ],
        cost=lambda job: job.base.nbytes,
        progress=progress or NoProgress(),
        what="measuring",
    )
    others = len(together) - len(additive)
    left_out = f"left out: {counted(others, 'tensor')} whose values are replaced or scaled"
    return ForecastReport(
        adapter.resolve().name,
        base.resolve().name,
        str(target),
        tuple(rows),
        (*placement.notes, *([left_out] if others else []), *_overflows(rows)),
    )


def _overflows(rows: Sequence[ForecastRow]) -> list[str]:
    """What to say of merged values that a dtype has no room for."""
    found = {dtype.name: sum(row.overflowed[dtype.name] for row in rows) for dtype in OUTPUTS}
    return [
        f"{counted(count, 'merged value lies', 'merged values lie')} beyond the range of {name}: "
        "merge refuses to store them, and what is lost does not count them"
        for name, count in found.items()
        if count
    ]


def _measure(job: _Job) -> ForecastRow:
    info = job.base
    rows, columns = matrix_shape(info.shape)
    if len(info.shape) < 2:
        rows, columns = info.rows, 1
    rounder = rounder_of(job.updates, info, 0, info.rows, device=job.device)
    update = torch.empty(rows, columns, dtype=torch.float32, device=job.device)
    weight = torch.empty_like(update)
    lost = {dtype.name: 0.0 for dtype in OUTPUTS}
    swallowed = {dtype.name: 0 for dtype in OUTPUTS}
    overflowed = {dtype.name: 0 for dtype in OUTPUTS}
    touched = 0
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        before = info.read_rows(start, stop)
        block = before.reshape(stop - start, columns).to(job.device)
        if not bool(torch.isfinite(block).all()):
            raise NonFiniteValues(f"{info.name}: holds NaN or infinity")
        weight[start:stop] = block
        nothing = torch.zeros(block.shape, dtype=torch.float32, device=job.device)
        update[start:stop] = rounder.add_to(nothing, start, torch.float32).values
        if not all_finite(update[start:stop]):
            raise RangeOverflow(f"{info.name}: the update is too large to be measured")
        moves = update[start:stop] != 0
        touched += int(moves.sum())
        for dtype in OUTPUTS:
            assert dtype.torch is not None
            merged = rounder.add_to(block, start, dtype.torch).values
            overflowed[dtype.name] += int((~torch.isfinite(merged)).sum())
            swallowed[dtype.name] += int((moves & (merged == block.to(dtype.torch))).sum())
            energies = rounding_energies(rounder, before, start, merged.cpu(), job.device)
            lost[dtype.name] += energies[0]
    is_matrix = len(info.shape) > 1 and all(placed.member is None for placed in job.updates)
    norms = [_spectral(m, info.name) if is_matrix else None for m in (update, weight)]
    return ForecastRow(
        info.name,
        info.dtype.name,
        sum_of_squares(update) ** 0.5,
        sum_of_squares(weight) ** 0.5,
        lost,
        swallowed,
        overflowed,
        touched,
        *norms,
    )


def _spectral(matrix: Tensor, name: str) -> float:
    """The largest singular value."""
    values = resolve_spectrum(matrix, parse_rank_rule("1"), key=f"0:{name}").values
    return float(values[0]) if len(values) else 0.0
