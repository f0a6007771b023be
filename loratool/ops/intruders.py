"""Strong directions of a tuned weight that its base does not have: Shuttleworth et al. (2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate, ModuleKind
from loratool.algebra.blocks import all_finite
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import resolve_spectrum
from loratool.algebra.intruders import Examined, examine
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NonFiniteValues, NothingMatches, RangeOverflow, UsageError
from loratool.layouts.pairs import Pair, align
from loratool.layouts.patterns import select
from loratool.layouts.placing import PlacedUpdate, TieChoice, place
from loratool.ops.amplification import labelled, on_weight
from loratool.ops.deltas import read_matrix
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.sources import is_adapter, measurable, open_adapter, open_model
from loratool.ops.stacks import is_indexed
from loratool.plural import counted
from loratool.provenance import document
from loratool.storage.dtypes import FLOATS
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Stored
from loratool.storage.writing import park

TOP, EPSILON = 10, 0.5
"""What the paper examines of each matrix, and its threshold."""

_KINDS = (ModuleKind.LINEAR, ModuleKind.CONV1D)


@dataclass(frozen=True)
class Asked:
    """top: leading singular vectors to look at, per matrix. epsilon: the threshold."""

    top: int = TOP
    epsilon: float = EPSILON
    exact: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"--top {self.top}: is not positive")
        if not 0 < self.epsilon <= 1:
            raise UsageError(f"--epsilon {self.epsilon:g}: is a cosine above 0, at most 1")


@dataclass(frozen=True)
class Direction:
    """A leading left singular vector of W, counted from 1. cosine: the largest |cos| to one of W0
    that was found; cosine_at_most: none has a larger one."""

    index: int
    value: float
    cosine: float
    cosine_at_most: float
    intruder: bool


@dataclass(frozen=True)
class IntruderRow:
    """One weight W beside its base W0, both as (out, in).

    update_value, base_value: ‖W − W0‖₂ and ‖W0‖₂. sine: bound on the sine of the angle between the
    directions as computed and the true ones. exact: whether both were decomposed whole. parts: of
    each weight with intruders Σ σ·u·vᵀ of them, parked: its factors b and a.
    """

    name: str
    shape: tuple[int, int]
    update_value: float
    base_value: float
    directions: tuple[Direction, ...]
    intruder_energy: float
    sine: float
    exact: bool
    part: tuple[TensorInfo, TensorInfo] | None = None

    @property
    def intruders(self) -> int:
        return sum(direction.intruder for direction in self.directions)

    @property
    def strength(self) -> float | None:
        """‖W − W0‖₂ / ‖W0‖₂; None where the base is zero."""
        return self.update_value / self.base_value if self.base_value else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "intruders": self.intruders,
            "intruder_energy": self.intruder_energy,
            "update_spectral_norm": self.update_value,
            "base_spectral_norm": self.base_value,
            "strength": self.strength,
            "exact": self.exact,
            "sine_at_most": self.sine,
            "directions": [
                {
                    "index": one.index,
                    "singular_value": one.value,
                    "cosine": one.cosine,
                    "cosine_at_most": one.cosine_at_most,
                    "intruder": one.intruder,
                }
                for one in self.directions
            ],
        }


@dataclass(frozen=True)
class Mitigated:
    """What was written. factor: λ. kind: checkpoint or adapter. error: ‖stored − exact‖_F of the
    updates as a share of their norm, before a merge rounds."""

    output: str
    kind: str
    factor: float
    tensors: int
    error: float

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "kind": self.kind,
            "lambda": self.factor,
            "tensors": self.tensors,
            "relative_error": self.error,
        }


@dataclass(frozen=True)
class IntruderReport:
    """Every weight examined. tuned: the checkpoint or the adapter. unchanged: weights that are
    the base's, and were not examined."""

    base: str
    tuned: str
    asked: Asked
    device: str
    rows: tuple[IntruderRow, ...]
    unchanged: int
    notes: tuple[str, ...]
    mitigated: Mitigated | None = None

    @property
    def intruders(self) -> int:
        """Of all weights together."""
        return sum(row.intruders for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "intruders",
            "level": str(Level.SPECTRA),
            "base": self.base,
            "tuned": self.tuned,
            "top": self.asked.top,
            "epsilon": self.asked.epsilon,
            "device": self.device,
            "intruders": self.intruders,
            "examined": sum(len(row.directions) for row in self.rows),
            "unchanged": self.unchanged,
            "mitigated": self.mitigated.to_json() if self.mitigated else None,
            "weights": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }
        return document("inspect", SCHEMA_VERSION, body)


@dataclass(frozen=True)
class WeightJob:
    """One weight. ``of``: a pair of tensors, or an update placed on a tensor of the base."""

    index: int
    name: str
    of: Pair | tuple[PlacedUpdate, TensorInfo]
    asked: Asked
    device: torch.device
    scratch: Path | None = None

    @property
    def cost(self) -> int:
        if isinstance(self.of, Pair):
            return self.of.base.nbytes + self.of.tuned.nbytes
        return self.of[1].nbytes


@dataclass(frozen=True)
class Looking:
    """What will be examined. ``jobs`` have the weights."""

    base: Path
    tuned: Path
    asked: Asked
    device: torch.device
    jobs: tuple[WeightJob, ...]
    notes: tuple[str, ...]


def plan_looking(
    base: Path,
    tuned: Path,
    *,
    top: int = TOP,
    epsilon: float = EPSILON,
    exact: bool = False,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
) -> Looking:
    """Pair a tuned checkpoint, or an adapter, with its base; headers only.

    Raises InputError, UsageError, NothingMatches, DisagreementError, and UnsupportedInput for
    weights that are not plain floats.
    """
    asked, target = Asked(top, epsilon, exact), resolve_device(device)
    if alpha is not None and not is_adapter(tuned):
        raise UsageError("--alpha is for adapters")
    found = _of_adapter(base, tuned, alpha) if is_adapter(tuned) else linear_pairs(base, tuned)
    things, notes = found
    chosen = select(list(things), only, ())
    jobs = tuple(
        WeightJob(index, name, things[name], asked, target)
        for index, name in enumerate(name for name in things if name in chosen)
    )
    return Looking(base, tuned, asked, target, jobs, notes)


def find_intruders(
    looking: Looking,
    *,
    scratch: Path | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> IntruderReport:
    """Examine one weight at a time. scratch: where the intruders' parts are parked, if asked for.

    Raises NonFiniteValues.
    """
    rows = (engine or Engine()).map(
        _examine_weight,
        [replace(job, scratch=scratch) for job in looking.jobs],
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="looking for intruders",
    )
    examined = tuple(row for row in rows if row is not None)
    return IntruderReport(
        looking.base.resolve().name,
        looking.tuned.resolve().name,
        looking.asked,
        str(looking.device),
        examined,
        len(rows) - len(examined),
        looking.notes,
    )


def linear_pairs(base: Path, tuned: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The linear layers of two checkpoints, one by one, and what is left out, in words.

    Raises InputError, NothingMatches, DisagreementError, UnsupportedInput.
    """
    ours, theirs = open_model(base), open_model(tuned)
    alignment = align(
        ours.checkpoint.tensors, theirs.checkpoint.tensors, ours.config, theirs.config
    )
    tied = {name for tie in alignment.ties for name in tie.names}
    weights = {
        pair.name: pair for pair in alignment.pairs if pair.kind in _KINDS and pair.name not in tied
    }
    if not weights:
        raise NothingMatches(
            f"{tuned}: holds no linear layer", hint="directions are compared of linear layers"
        )
    for pair in weights.values():
        for side in (pair.base, pair.tuned):
            if isinstance(side, TensorInfo):
                measurable(side, FLOATS)
    others = sum(len(pair.base.shape) > 1 for pair in alignment.pairs) - len(weights)
    left_out = (
        f"left out: {counted(others, 'matrix', 'matrices')} within no linear layer of their own"
    )
    return dict(weights), (*alignment.notes, *([left_out] if others else []))


def _of_adapter(
    base: Path, adapter: Path, alpha: float | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    value, model = open_adapter(adapter, alpha), open_model(base)
    tensors = model.checkpoint.tensors
    placement = place([(value, 1.0)], tensors, model.config, ties=TieChoice.BOTH)
    weights: dict[str, Any] = {}
    others = 0
    for label, name, placed in labelled(placement.updates):
        update = placed.update
        if isinstance(update, LowRankUpdate) and _is_of_a_layer(placed, update):
            weights[label] = (placed, measurable(tensors[name], FLOATS))
        else:
            others += 1
    if not weights:
        raise NothingMatches(
            f"{adapter}: holds no low-rank update of a layer",
            hint="merge it and compare the checkpoints",
        )
    left_out = f"left out: {counted(others, 'update')} that no LoRA of a linear layer makes"
    return weights, (*placement.notes, *([left_out] if others else []))


def _is_of_a_layer(placed: PlacedUpdate, update: LowRankUpdate) -> bool:
    is_plain = not update.is_embedding and not update.kernel
    return is_plain and placed.member is None and not is_indexed(placed.source)


def _examine_weight(job: WeightJob) -> IntruderRow | None:
    loaded = _both(job)
    if loaded is None:
        return None
    base, tuned, update_value = loaded
    key, asked = f"0:{job.name}", job.asked
    found = examine(base, tuned, top=asked.top, epsilon=asked.epsilon, key=key, exact=asked.exact)
    part = None
    if job.scratch is not None and (value := found.part()) is not None:
        parked = park(job.scratch / f"intruders-{job.index}.raw", {"b": value.b, "a": value.a})
        part = parked["b"], parked["a"]
    values = found.triplets.values
    energy = float(values[found.intruders].square().sum()) / sum_of_squares(tuned)
    return IntruderRow(
        job.name,
        (base.shape[0], base.shape[1]),
        update_value,
        found.base_value,
        _directions(found),
        energy,
        float(found.triplets.sines.max()),
        found.exact,
        part,
    )


def _directions(found: Examined) -> tuple[Direction, ...]:
    columns = (
        found.triplets.values.tolist(),
        found.cosines.tolist(),
        found.at_most.tolist(),
        found.intruders.tolist(),
    )
    return tuple(
        Direction(index, *row) for index, row in enumerate(zip(*columns, strict=True), start=1)
    )


def _both(job: WeightJob) -> tuple[Tensor, Tensor, float] | None:
    """W0 and W as (out, in), float32, with ‖W − W0‖₂; None where they are equal, or W is zero."""
    if isinstance(job.of, Pair):
        base, tuned = (
            pair_matrix(job.of, side, job.device) for side in (job.of.base, job.of.tuned)
        )
        if torch.equal(base, tuned) or not bool(tuned.any()):
            return None
        value = resolve_spectrum(tuned - base, parse_rank_rule("1"), key=f"0:{job.name}:change")
        return base, tuned, float(value.values[0])
    placed, info = job.of
    base, update = on_weight(placed, info, job.device)
    tuned = torch.addmm(base, update.b.float(), update.a.float(), alpha=update.scale)
    if not all_finite(tuned):
        raise RangeOverflow(f"{job.name}: the update is too large to be examined")
    values = update.svd().values
    if not len(values) or not bool(tuned.any()):
        return None
    return base, tuned, float(values[0])


def pair_matrix(pair: Pair, side: Stored, device: torch.device) -> Tensor:
    """One side of a linear layer as (out, in), float32, read in blocks. Raises NonFiniteValues."""
    matrix = read_matrix(side, device)
    if not all_finite(matrix):
        raise NonFiniteValues(f"{pair.name}: holds NaN or infinity in base or tuned")
    return matrix.T.contiguous() if pair.kind is ModuleKind.CONV1D else matrix


def parked_part(row: IntruderRow) -> LowRank:
    """Σ σ·u·vᵀ of a weight that has intruders."""
    assert row.part is not None
    b, a = row.part
    return LowRank(b.read(), a.read())
