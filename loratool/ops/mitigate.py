"""Weakening intruder dimensions: W + (λ − 1)·Σ σ·u·vᵀ over the intruders of each weight.

Shuttleworth et al. (2024), §5. Of a pair the result is the tuned checkpoint with those weights
changed, each value rounded once, as by a merge. Of an adapter with its base it is an adapter: the
change is put beside its factors, whose rank grows by the number of intruders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind, Update
from loratool.algebra.lowrank import LowRank
from loratool.algebra.stacking import stacked
from loratool.algebra.truncation import rounding
from loratool.engine import Engine, Progress
from loratool.errors import NothingMatches, UnsupportedInput, UsageError
from loratool.formats import peft
from loratool.layouts.pairs import Pair
from loratool.layouts.placing import PlacedUpdate
from loratool.ops.adapter_folder import (
    load_update,
    park_factors,
    park_update,
    stored_value,
    write_adapter,
)
from loratool.ops.intruders import (
    EPSILON,
    TOP,
    IntruderReport,
    IntruderRow,
    Looking,
    Mitigated,
    find_intruders,
    parked_part,
    plan_looking,
)
from loratool.ops.merge import plan_merge, run_merge
from loratool.ops.sources import is_adapter, open_adapter, open_model
from loratool.storage.dtypes import F32
from loratool.storage.outputs import check_free_space, check_output, staged


@dataclass(frozen=True)
class MitigatePlan:
    """Everything decided before a weight is read. factor: λ."""

    looking: Looking
    factor: float
    output: Path
    alpha: float | None
    overwrite: bool

    @property
    def writes_adapter(self) -> bool:
        return is_adapter(self.looking.tuned)

    @property
    def output_bytes_at_most(self) -> int:
        """Size of the output, if every vector examined is an intruder."""
        if not self.writes_adapter:
            return open_model(self.looking.tuned).checkpoint.size_bytes
        adapter = open_adapter(self.looking.tuned, self.alpha)
        stored = sum(math.prod(t.shape) for t in adapter.tensors)
        added = sum(
            self.looking.asked.top * sum(update.shape) for update in adapter.low_rank.values()
        )
        return (stored + added) * F32.bits // 8

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.looking.base.resolve().name,
            "tuned": self.looking.tuned.resolve().name,
            "kind": "adapter" if self.writes_adapter else "checkpoint",
            "lambda": self.factor,
            "top": self.looking.asked.top,
            "epsilon": self.looking.asked.epsilon,
            "device": str(self.looking.device),
            "weights": [job.name for job in self.looking.jobs],
            "read_bytes": sum(job.cost for job in self.looking.jobs),
            "output_bytes_at_most": self.output_bytes_at_most,
            "notes": list(self.looking.notes),
        }


def plan_mitigate(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    factor: float,
    top: int = TOP,
    epsilon: float = EPSILON,
    exact: bool = False,
    only: Sequence[str] = (),
    alpha: float | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> MitigatePlan:
    """Read headers, check the output. Nothing is written.

    factor: λ, what the intruders' singular values are multiplied with; 0 removes them. Raises
    UsageError, OutputError, and what ``plan_looking`` raises.
    """
    if not (math.isfinite(factor) and factor >= 0 and factor != 1):
        raise UsageError(
            f"--mitigate {factor:g}: is a factor of at least 0, and 1 changes nothing",
            hint="the paper finds 0.75 a good compromise; 0 removes the intruders",
        )
    looking = plan_looking(
        base,
        tuned,
        top=top,
        epsilon=epsilon,
        exact=exact,
        only=only,
        alpha=alpha,
        device=device,
    )
    check_output(output, overwrite=overwrite, inputs=[base, tuned])
    plan = MitigatePlan(looking, factor, output, alpha, overwrite)
    if plan.writes_adapter:
        peft.encode(open_adapter(tuned, alpha), None)  # what cannot be stored is said at once
    check_free_space(output, plan.output_bytes_at_most)
    return plan


def run_mitigate(
    plan: MitigatePlan, engine: Engine | None = None, progress: Progress | None = None
) -> IntruderReport:
    """Find the intruders and publish the checkpoint or adapter with them weakened.

    Raises NothingMatches where there are none: nothing is written then; NonFiniteValues and
    RangeOverflow.
    """
    looking = plan.looking
    beside = plan.output.with_name(f".{plan.output.name}-intruders")
    with staged(beside) as staging:
        report = find_intruders(looking, scratch=staging.scratch, engine=engine, progress=progress)
        if not report.intruders:
            raise NothingMatches(
                f"{looking.tuned}: no intruder dimension found; there is nothing to mitigate",
                hint=f"of {looking.asked.top} vectors of each weight none has all cosines below "
                f"{looking.asked.epsilon:g}",
            )
        rows = {row.name: row for row in report.rows if row.part is not None}
        if plan.writes_adapter:
            return _write_adapter(plan, report, rows)
        changes = staging.scratch / "intruders"
        changes.mkdir()
        error = _write_changes(plan, rows, staging.scratch, changes)
        device = str(looking.device)
        merging = plan_merge(
            looking.tuned, [(changes, 1.0)], plan.output, device=device, overwrite=plan.overwrite
        )
        run_merge(merging, engine, progress)
        return replace(
            report,
            mitigated=Mitigated(plan.output.name, "checkpoint", plan.factor, len(rows), error),
        )


@dataclass
class _Storing:
    """Rounds values to what is stored, and sums what that misses: ‖rounding‖², of ‖exact‖²."""

    missed: float = 0.0
    total: float = 0.0

    def stored(self, name: str, exact: LowRank) -> LowRank:
        value = stored_value(name, exact, F32)
        self.missed += rounding(exact, value).norm() ** 2
        self.total += exact.norm() ** 2
        return value

    @property
    def error(self) -> float:
        """As a share of the values' norm."""
        return math.sqrt(self.missed / self.total) if self.total else 0.0


def _weakened(plan: MitigatePlan, row: IntruderRow) -> LowRank:
    """(λ − 1)·Σ σ·u·vᵀ."""
    part = parked_part(row)
    return LowRank(part.b.double() * (plan.factor - 1), part.a.double())


def _write_changes(
    plan: MitigatePlan, rows: Mapping[str, IntruderRow], scratch: Path, folder: Path
) -> float:
    """The changes of a pair's weights as an adapter for the tuned checkpoint; how much its
    factors miss, as a share of the changes' norm."""
    updates: dict[str, Update] = {}
    kinds = set()
    storing = _Storing()
    for job in plan.looking.jobs:
        if (row := rows.get(job.name)) is None:
            continue
        assert isinstance(job.of, Pair)
        kinds.add(job.of.kind)
        stored = storing.stored(job.name, _weakened(plan, row))
        parked = scratch / f"change-{job.index}.raw"
        updates[job.name] = park_factors(parked, stored, (), is_embedding=False)
    adapter = Adapter(updates, peft.NAME, fan_in_fan_out=ModuleKind.CONV1D in kinds)
    write_adapter(folder, adapter, {})
    return storing.error


def _write_adapter(
    plan: MitigatePlan, report: IntruderReport, rows: Mapping[str, IntruderRow]
) -> IntruderReport:
    """The adapter with the change put beside the factors of each update that has intruders."""
    adapter = open_adapter(plan.looking.tuned, plan.alpha)
    changes: dict[str, list[tuple[PlacedUpdate, LowRank]]] = {}
    for job in plan.looking.jobs:
        if (row := rows.get(job.name)) is not None:
            assert not isinstance(job.of, Pair)
            placed = job.of[0]
            changes.setdefault(placed.source, []).append((placed, _weakened(plan, row)))
    storing = _Storing()
    with staged(plan.output) as staging:
        updates: dict[str, Update] = {}
        for index, (name, update) in enumerate(adapter.updates.items()):
            if name not in changes:
                updates[name] = update
                continue
            assert isinstance(update, LowRankUpdate)
            value = load_update(str(plan.looking.tuned), update, plan.looking.device)
            exact = value
            for placed, change in changes[name]:
                exact = _beside(name, exact, placed, change)
            stored = storing.stored(name, exact)
            updates[name] = park_update(staging.scratch / f"{index}.raw", stored, update)
        written = Mitigated(plan.output.name, "adapter", plan.factor, len(changes), storing.error)
        report = replace(report, mitigated=written)
        mitigated = replace(adapter, updates=updates, format=peft.NAME)
        write_adapter(staging.out, mitigated, report.to_json())
        staging.publish(overwrite=plan.overwrite)
    return report


def _beside(name: str, value: LowRank, placed: PlacedUpdate, change: LowRank) -> LowRank:
    """The sum, of the ranks' sum, at the adapter's scale. Raises UnsupportedInput."""
    if value.scale == 0:
        raise UnsupportedInput(f"{name}: the adapter's scale is 0; nothing can be put beside it")
    b = change.b
    if placed.places is not None:
        wide = b.new_zeros(value.shape[0], b.shape[1])
        rows = [place for place in placed.places if place >= 0]
        wide[rows] = b
        b = wide
    wide_value = LowRank(value.b.double(), value.a.double(), value.scale)
    return stacked(wide_value, LowRank(b, change.a, change.scale))
