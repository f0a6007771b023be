"""Where an adapter's updates lie in the weights they are added to: Hu et al. (2022), §7.3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate
from loratool.algebra.blocks import all_finite
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import leading_triplets
from loratool.algebra.lowrank import LowRank
from loratool.algebra.subspaces import (
    phi_expected,
    phi_grid,
    projected_norm,
    projected_norm_by_chance,
)
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NonFiniteValues, NothingMatches
from loratool.layouts.patterns import select
from loratool.layouts.placing import PlacedUpdate, TieChoice, place
from loratool.ops.adapter_folder import load_update
from loratool.ops.sources import measurable, open_adapter, open_model
from loratool.plural import counted
from loratool.provenance import document
from loratool.storage.dtypes import FLOATS
from loratool.storage.tensors import TensorInfo

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AmplificationRow:
    """One update ΔW beside its weight W, both as (out, in).

    rank: r, the numerical rank of ΔW. inside: ‖UᵀWV‖_F with U and V the r left and right singular
    vectors of ΔW; inside_own: the same with those of W, its r largest; inside_by_chance: with
    random ones. phi_left, phi_right: φ(r, r) between ΔW's spaces and those of W's r largest
    singular values, 1 where they are the same; None for an update of zero.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    delta_norm: float
    base_norm: float
    inside: float
    inside_own: float
    inside_by_chance: float
    phi_left: float | None
    phi_right: float | None

    @property
    def amplification(self) -> float | None:
        """‖ΔW‖_F / ‖UᵀWV‖_F; None where the weight has nothing in those directions."""
        return self.delta_norm / self.inside if self.inside else None

    @property
    def phi_by_chance(self) -> tuple[float, float]:
        """Left and right φ of unrelated spaces."""
        rows, columns = self.shape
        return phi_expected(self.rank, self.rank, rows), phi_expected(self.rank, self.rank, columns)

    def to_json(self) -> dict[str, Any]:
        left, right = self.phi_by_chance
        return {
            **vars(self),
            "shape": list(self.shape),
            "amplification": self.amplification,
            "phi_left_by_chance": left,
            "phi_right_by_chance": right,
        }


@dataclass(frozen=True)
class AmplificationReport:
    """What an adapter, or the change to a tuned checkpoint, strengthens in its base.

    adapter: the name of either; of_pair: whether it is a checkpoint's.
    """

    adapter: str
    base: str
    device: str
    rows: tuple[AmplificationRow, ...]
    notes: tuple[str, ...]
    of_pair: bool = False

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "amplification",
            "adapter": self.adapter,
            "of_pair": self.of_pair,
            "base": self.base,
            "device": self.device,
            "updates": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }
        return document("inspect", SCHEMA_VERSION, body)


@dataclass(frozen=True)
class _Job:
    placed: PlacedUpdate
    name: str
    base: TensorInfo
    device: torch.device

    @property
    def cost(self) -> int:
        return self.base.nbytes


def amplification(
    adapter: Path,
    base: Path,
    *,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AmplificationReport:
    """Lay every low-rank update of ``adapter`` over the weight it is for, one weight at a time.

    only: globs over the base's names. Norms and projections are float64 sums over the weight in
    float32. W's own singular vectors come from the method that extract uses. Raises InputError,
    DisagreementError, NothingMatches where no update is low-rank, UnsupportedInput for a weight
    that is not a plain float tensor, and NonFiniteValues.
    """
    target = resolve_device(device)
    value, model = open_adapter(adapter, alpha), open_model(base)
    tensors = model.checkpoint.tensors
    placement = place([(value, 1.0)], tensors, model.config, ties=TieChoice.BOTH)
    chosen = select(list(placement.updates), only, ())
    looked_at = labelled({n: placed for n, placed in placement.updates.items() if n in chosen})
    jobs = [
        _Job(placed, label, measurable(tensors[name], FLOATS), target)
        for label, name, placed in looked_at
        if isinstance(placed.update, LowRankUpdate)
    ]
    if not jobs:
        raise NothingMatches(
            f"{adapter}: holds no low-rank update", hint="other kinds have no directions to compare"
        )
    others = len(looked_at) - len(jobs)
    left_out = f"left out: {counted(others, 'update')} not of low rank"
    rows = (engine or Engine()).map(
        _measure,
        jobs,
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="measuring",
    )
    return AmplificationReport(
        adapter.resolve().name,
        base.resolve().name,
        str(target),
        tuple(rows),
        (*placement.notes, *([left_out] if others else [])),
    )


def _measure(job: _Job) -> AmplificationRow:
    return measured(job.name, *on_weight(job.placed, job.base, job.device))


def measured(name: str, weight: Tensor, value: LowRank) -> AmplificationRow:
    """An update beside the weight that it is added to, both as (out, in·k…)."""
    shape = value.shape
    if turned := not weight.is_contiguous():  # as it is stored; left and right change places
        weight, value = weight.T, value.T
    u, values, v = value.svd()
    rank = len(values)
    norm = math.sqrt(sum_of_squares(weight))
    chance = projected_norm_by_chance(norm, rank, shape)
    row = AmplificationRow(
        name, shape, rank, float(values.norm()), norm, 0.0, 0.0, chance, None, None
    )
    if not rank or not norm:
        return row
    own = leading_triplets(weight, rank, key=f"0:{name}")
    phi = [
        float(phi_grid((ours.T @ theirs.double()).cpu())[-1, -1])
        for ours, theirs in ((u, own.u), (v, own.v))
    ]
    left, right = reversed(phi) if turned else phi
    return replace(
        row,
        inside=projected_norm(weight, u, v),
        inside_own=float(own.values.norm()),
        phi_left=left,
        phi_right=right,
    )


def labelled(
    updates: Mapping[str, Sequence[PlacedUpdate]],
) -> list[tuple[str, str, PlacedUpdate]]:
    """Every update with a label of its own and its tensor: (label, tensor, update)."""
    return [
        (name if len(together) == 1 else f"{name} ({placed.source})", name, placed)
        for name, together in updates.items()
        for placed in together
    ]


def on_weight(
    placed: PlacedUpdate, base: TensorInfo, device: torch.device
) -> tuple[Tensor, LowRank]:
    """The weight as (out, in·k…), float32, and the update of it; of some rows where it has some.

    Raises NonFiniteValues.
    """
    update = placed.update
    assert isinstance(update, LowRankUpdate)
    value = load_update(placed.source, update, device)
    if update.is_embedding:
        value = value.T
    if placed.member is None:
        stored = base.read()
    else:
        stored = base.read_rows(placed.member, placed.member + 1)[0]
    weight = stored.to(device).float().flatten(1)
    if not all_finite(weight):
        raise NonFiniteValues(f"{base.name}: holds NaN or infinity")
    weight = weight.T if placed.transposed else weight  # a view: GPT-3's takes 1.8 GB
    b = value.b
    if placed.places is not None:
        rows = [row for row, place in enumerate(placed.places) if place >= 0]
        weight, b = weight[rows], b[[placed.places[row] for row in rows]]
    return weight, LowRank(b, value.a, value.scale)
