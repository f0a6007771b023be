"""Is an adapter what it claims to be: the change from one checkpoint to another?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from loratool.algebra.noise import ulp
from loratool.algebra.rounding import MERGEABLE
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import MalformedFile, NonFiniteValues, NothingMatches, ShapeMismatch
from loratool.layouts.fused import refit
from loratool.layouts.kinds import classify
from loratool.layouts.names import match_names, unwrapped
from loratool.layouts.placing import PlacedUpdate, describe, place
from loratool.layouts.ties import Tie, find_ties, same_values
from loratool.ops.extract_report import LEFT_OUT, Status
from loratool.ops.sources import Model, open_adapter, open_model
from loratool.ops.verify_diagnosis import delta_of
from loratool.ops.verify_report import DIFFERS
from loratool.plural import counted
from loratool.provenance import REPORT_FILE, document
from loratool.receipt import blocks_of
from loratool.storage.checkpoint import read_json_file
from loratool.storage.tensors import TensorInfo, equal_values
from loratool.storage.views import Stored

SCHEMA_VERSION = 1
AS_STATED, UNSTATED = "as stated", "states nothing"
_TOLERANCE = 1e-3
_FLOOR = 1e-6
"""Differences below a thousandth of the stated error, or a millionth of the change, are none."""


class ClaimStatus(StrEnum):
    """What is to be said of one tensor."""

    AS_STATED = "as stated"
    WORSE = "misses more than stated"
    UNSTATED = "nothing stated"
    LEFT_OUT = "left out, as stated"
    UNEXPLAINED = "changed, and not in the adapter"
    ALONE = "changed by the adapter alone"
    POINTLESS = "in the adapter, and unchanged"


NOT_AS_STATED = (ClaimStatus.WORSE, ClaimStatus.UNEXPLAINED, ClaimStatus.ALONE)


@dataclass(frozen=True)
class ClaimRow:
    """One tensor that changed or that the adapter changes.

    delta_norm: ‖D‖_F, D = tuned − base; NaN of what was left out and is not finite. measured,
    stated: ‖D − ΔW‖_F / ‖D‖_F, of all tensors together that one entry of the report is of. tied_to:
    the name under which the same matrix is counted.
    """

    name: str
    update: str
    status: ClaimStatus
    delta_norm: float
    missed_norm: float
    measured: float | None
    stated: float | None
    tied_to: str | None = None


@dataclass(frozen=True)
class ClaimReport:
    """verdict: ``as stated``, ``differs``, or ``states nothing`` where there is no report to hold
    the adapter to. relative_error: over all tensors, those left out included."""

    verdict: str
    rows: tuple[ClaimRow, ...]
    facts: Mapping[str, Any]

    @property
    def differs(self) -> bool:
        """Whether the answer is no."""
        return self.verdict == DIFFERS

    @property
    def relative_error(self) -> float | None:
        energy = sum(row.delta_norm**2 for row in self._counted)
        missed = sum(row.missed_norm**2 for row in self._counted)
        return math.sqrt(missed / energy) if energy else None

    @property
    def _counted(self) -> list[ClaimRow]:
        """A row of each matrix whose change has a size, whatever its names."""
        return [row for row in self.rows if row.tied_to is None and row.name not in self.unsized]

    @property
    def unsized(self) -> list[str]:
        """Tensors that were left out and hold NaN or infinity."""
        return [row.name for row in self.rows if math.isnan(row.delta_norm)]

    def count(self, status: ClaimStatus) -> int:
        """How many tensors ended so."""
        return sum(row.status is status for row in self.rows)

    def share(self, status: ClaimStatus) -> float:
        """Share of ‖D‖² in those tensors."""
        energy = sum(row.delta_norm**2 for row in self._counted)
        chosen = sum(row.delta_norm**2 for row in self._counted if row.status is status)
        return chosen / energy if energy else 0.0

    def to_json(self) -> dict[str, Any]:
        return document(
            "verify-adapter",
            SCHEMA_VERSION,
            {
                **self.facts,
                "verdict": self.verdict,
                "relative_error": self.relative_error,
                "totals": {str(status): self.count(status) for status in ClaimStatus},
                "tensors": [dict(vars(row)) for row in self.rows],
            },
        )


@dataclass(frozen=True)
class _Job:
    """A tensor of the base, the tuned one, and what the report says of it: entries of its own, or
    of the parts that it was taken apart into."""

    base: TensorInfo
    tuned: Stored
    updates: tuple[PlacedUpdate, ...]
    stated: tuple[Mapping[str, Any], ...]
    device: torch.device

    @property
    def cost(self) -> int:
        return self.base.nbytes


def verify_claim(
    adapter: Path,
    base: Path,
    tuned: Path,
    *,
    alpha: float | None = None,
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> ClaimReport:
    """Measure what the adapter misses of tuned − base, tensor by tensor, against its own report.

    Raises InputError and DisagreementError.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    value, first, second = open_adapter(adapter, alpha), open_model(base), open_model(tuned)
    ours, theirs = first.checkpoint.tensors, second.checkpoint.tensors
    placement = place([(value, 1.0)], ours, first.config)
    pairs, notes = _pairs(ours, theirs)
    ties = _ties(first)
    _check_compared(placement.updates, {info.name for info, _ in pairs}, ties)
    stated = _stated(adapter)
    said = _said_of(stated or {}, placement.updates, ours)
    target = resolve_device(device)
    jobs = [
        _Job(info, other, placement.updates.get(info.name, ()), said.get(info.name, ()), target)
        for info, other in pairs
    ]
    found = engine.map(
        _measure, jobs, cost=lambda job: job.cost, progress=progress, what="verifying"
    )
    tied = _tied_to(ties, {info.name: (info, other) for info, other in pairs})
    rows = tuple(
        replace(row, tied_to=tied.get(row.name))
        for row in _judged_together(jobs, found)
        if row is not None
    )
    verdict = AS_STATED if stated is not None else UNSTATED
    if any(row.status in NOT_AS_STATED for row in rows):
        verdict = DIFFERS
    facts = {
        "adapter": adapter.resolve().name,
        "adapter_format": value.format,
        "base": first.checkpoint.path.resolve().name,
        "tuned": second.checkpoint.path.resolve().name,
        "unchanged": len(jobs) - len(rows),
        "device": str(target),
        "notes": [*notes, *placement.notes],
    }
    return ClaimReport(verdict, rows, facts)


def _stated(adapter: Path) -> dict[str, Mapping[str, Any]] | None:
    """What the adapter's own report says, by parameter; None where there is no such report."""
    path = (adapter if adapter.is_dir() else adapter.parent) / REPORT_FILE
    if not path.is_file():
        return None
    report = read_json_file(path)
    entries = report.get("tensors")
    if not str(report.get("schema", "")).startswith("loratool/extract/"):
        return None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries
    ):
        raise MalformedFile(f"{path}: its tensors are not a list of named entries")
    return {entry["name"]: entry for entry in entries}


def _pairs(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]
) -> tuple[list[tuple[TensorInfo, Stored]], list[str]]:
    """Tensors of both sides by name, give or take a prefix, with fused layers as the base has
    them, and notes on what has no partner."""
    ours_by_name, notes = unwrapped(base, "base")
    theirs_by_name, also = unwrapped(tuned, "tuned")
    refitted = refit(theirs_by_name, ours_by_name)
    matched = match_names(refitted.tensors, ours_by_name)
    notes = [*notes, *also]
    if matched.note:
        notes.append(f"{matched.note} of the tuned checkpoint in the base")
    if refitted.note:
        notes.append(f"{refitted.note}, as the base has it")
    if not matched.found:
        raise NothingMatches("base and tuned have no tensor in common")
    alone = [*matched.missing, *(set(ours_by_name) - set(matched.found.values()))]
    if alone:
        more = f", … {len(alone) - 3} more" if len(alone) > 3 else ""
        notes.append(f"on one side only: {', '.join(sorted(alone)[:3])}{more}")
    pairs = [
        (ours_by_name[ours], refitted.tensors[theirs]) for theirs, ours in matched.found.items()
    ]
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ShapeMismatch(
                f"{ours.name}: is {list(ours.shape)} in the base and {list(theirs.shape)} in the "
                "tuned checkpoint",
                hint="a resized vocabulary? such pairs cannot be compared",
            )
    return pairs, notes


def _ties(base: Model) -> tuple[Tie, ...]:
    tensors = base.checkpoint.tensors
    kinds = classify({name: info.shape for name, info in tensors.items()}, base.config)
    return find_ties(tensors, kinds, base.config)


def _tied_to(ties: Iterable[Tie], pairs: Mapping[str, tuple[TensorInfo, Stored]]) -> dict[str, str]:
    """Names that have the values of the tie's first one on both sides → that one."""
    return {
        name: tie.main
        for tie in ties
        if tie.main in pairs
        for name in tie.stored - {tie.main}
        if name in pairs
        and all(same_values(*sides) for sides in zip(pairs[tie.main], pairs[name], strict=True))
    }


def _check_compared(updates: Iterable[str], compared: set[str], ties: Iterable[Tie]) -> None:
    """Raises NothingMatches for what the adapter changes and tuned stores under other names.

    A tied tensor may be stored under one name and compared there.
    """
    tied = {name for tie in ties if tie.stored & compared for name in tie.names}
    lost = [name for name in updates if name not in compared | tied]
    if lost:
        of = "that the adapter changes"
        raise NothingMatches(
            f"{counted(len(lost), f'tensor {of} is', f'tensors {of} are')} not in the tuned "
            "checkpoint",
            details=lost[:8],
            hint="does it store them in another layout? convert it to that of the base first",
        )


def _judged_together(
    jobs: Sequence[_Job], rows: Sequence[ClaimRow | None]
) -> list[ClaimRow | None]:
    """The rows, where one entry of the report is of several tensors (gate and up of an expert) by
    what they miss together: each alone may miss more than is stated, or less."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        if job.updates and job.stated:
            groups.setdefault(tuple(entry["name"] for entry in job.stated), []).append(index)
    judged = list(rows)
    for group in groups.values():
        members = {index: row for index in group if (row := rows[index]) is not None}
        energy = sum(row.delta_norm**2 for row in members.values())
        if len(group) < 2 or not energy:
            continue
        measured = math.sqrt(sum(row.missed_norm**2 for row in members.values()) / energy)
        for index, row in members.items():
            status = _status(jobs[index], measured, row.stated)
            judged[index] = replace(row, measured=measured, status=status)
    return judged


def _said_of(
    stated: Mapping[str, Mapping[str, Any]],
    updates: Mapping[str, tuple[PlacedUpdate, ...]],
    base: Mapping[str, TensorInfo],
) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """The report's entries by the base's tensor."""
    said: dict[str, tuple[Mapping[str, Any], ...]] = {}
    for theirs, ours in match_names(stated, base).found.items():
        said[ours] = (stated[theirs],)
    for name, placed in updates.items():
        sources = dict.fromkeys(update.source for update in placed)
        entries = tuple(stated[source] for source in sources if source in stated)
        if name not in said and entries:
            said[name] = entries
    return said


def _measure(job: _Job) -> ClaimRow | None:
    update = describe(job.updates) if job.updates else ""
    if not job.updates and equal_values(job.base, job.tuned):
        return None
    energy, missed = _energies(job)
    if not math.isfinite(energy + missed):
        if job.updates or _status(job, None, None) is not ClaimStatus.LEFT_OUT:
            raise NonFiniteValues(f"{job.base.name}: NaN or infinity in base, tuned or the update")
        return ClaimRow(job.base.name, update, ClaimStatus.LEFT_OUT, math.nan, 0.0, None, None)
    delta_norm, missed_norm = math.sqrt(energy), math.sqrt(missed)
    measured = missed_norm / delta_norm if delta_norm else None
    stated = _stated_error(job.stated)
    status = _status(job, measured, stated)
    return ClaimRow(job.base.name, update, status, delta_norm, missed_norm, measured, stated)


def _stated_error(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """The relative error of all entries together; what is stored whole misses nothing."""
    energy = missed = 0.0
    for entry in entries:
        norm, error = entry.get("delta_norm"), entry.get("relative_error")
        if entry.get("status") == Status.WHOLE:
            error = 0.0
        if not isinstance(norm, int | float) or not isinstance(error, int | float):
            return None
        energy += norm**2
        missed += (norm * error) ** 2
    return math.sqrt(missed / energy) if energy else None


def _status(job: _Job, measured: float | None, stated: float | None) -> ClaimStatus:
    if not job.updates:
        left_out = job.stated and all(entry.get("status") in LEFT_OUT for entry in job.stated)
        return ClaimStatus.LEFT_OUT if left_out else ClaimStatus.UNEXPLAINED
    if measured is None:
        return ClaimStatus.POINTLESS if _is_swallowed(job) else ClaimStatus.ALONE
    if stated is None:
        return ClaimStatus.UNSTATED
    worse = measured > stated * (1 + _TOLERANCE) + _FLOOR
    return ClaimStatus.WORSE if worse else ClaimStatus.AS_STATED


def _is_swallowed(job: _Job) -> bool:
    """Whether rounding alone can be why a tensor that the adapter changes did not change: ‖ΔW‖ is
    at most that of half a unit in the last place of every weight."""
    base = job.base
    if base.dtype.torch not in MERGEABLE:
        return False
    delta = delta_of(base, job.updates, job.device)
    energy = most = 0.0
    for start, stop in blocks_of(base.shape):
        before = base.read_rows(start, stop).reshape(stop - start, -1)
        energy += float(delta(before, start).square().sum())
        most += float(ulp(before).double().square().sum()) / 4
    return energy <= most


def _energies(job: _Job) -> tuple[float, float]:
    """‖D‖² and ‖D − ΔW‖², summed in float64; ΔW to float32 precision."""
    base, tuned = job.base, job.tuned
    if not (base.dtype.is_float and tuned.dtype.is_float):
        return 1.0, 1.0
    update = delta_of(base, job.updates, job.device) if job.updates else None
    energy = missed = 0.0
    for start, stop in blocks_of(base.shape):
        before = base.read_rows(start, stop).reshape(stop - start, -1)
        after = tuned.read_rows(start, stop).reshape(stop - start, -1)
        d = after.double() - before.double()
        energy += float(d.square().sum())
        rest = d if update is None else d - update(before, start)
        missed += float(rest.square().sum())
    return energy, missed
