"""From a base and a tuned checkpoint to a PEFT adapter, with every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind, Replacement, Update, module_of
from loratool.algebra.factorize import factorize, identity_factors, residual_norm
from loratool.algebra.lora_test import lora_rank
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankLimits, RankRule, parse_rank_rule
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import (
    NothingMatches,
    RangeOverflow,
    Unplaced,
    UsageError,
)
from loratool.formats import peft
from loratool.layouts.config import is_hub_id
from loratool.layouts.pairs import Alignment, Pair, align, check_floats
from loratool.layouts.patterns import matches, select
from loratool.layouts.targets import targeted
from loratool.ops.deltas import read_delta
from loratool.ops.extract_report import ExtractReport, Status, TensorRow
from loratool.ops.sources import Model, open_model
from loratool.provenance import REPORT_FILE, fingerprint
from loratool.storage.dtypes import BY_NAME, USER_NAMES, DType
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.writing import (
    check_free_space,
    check_output,
    park,
    staged,
    write_tensors,
)

LOW_RANK_KINDS = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.EMBEDDING)
_STORABLE = (ModuleKind.NORM, ModuleKind.BIAS, ModuleKind.POSITION, ModuleKind.CONV)


class Treatment(StrEnum):
    """What happens to a tensor if it changed."""

    LOW_RANK = "low-rank"
    WHOLE = "whole"
    EXCLUDED = "excluded"
    NO_PLACE = "no place"


@dataclass(frozen=True)
class ExtractJob:
    """One tensor: where it lies on both sides and what to make of its change."""

    index: int
    pair: Pair
    treatment: Treatment
    rule: RankRule
    dtype: DType
    device: torch.device
    seed: int
    exact: bool
    scratch: Path | None

    @property
    def cost(self) -> int:
        return self.pair.base.nbytes + self.pair.tuned.nbytes


@dataclass(frozen=True)
class ExtractPlan:
    """Everything decided before a tensor is read."""

    base: Model
    tuned: Model
    output: Path
    rule: RankRule
    dtype: DType
    device: torch.device
    seed: int
    base_model: str | None
    drop_rest: bool
    overwrite: bool
    alignment: Alignment
    jobs: tuple[ExtractJob, ...]

    @property
    def read_bytes(self) -> int:
        return sum(job.cost for job in self.jobs)

    @property
    def adapter_bytes_at_most(self) -> int:
        """Size of the adapter if every tensor changed."""
        return sum(_output_bytes(job) for job in self.jobs)

    def peak_bytes(self, workers: int) -> int:
        """Working memory: the largest jobs that can run side by side."""
        return sum(sorted((_job_memory(job) for job in self.jobs), reverse=True)[:workers])

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            "rank": str(self.rule),
            "dtype": self.dtype.name,
            "device": str(self.device),
            "read_bytes": self.read_bytes,
            "adapter_bytes_at_most": self.adapter_bytes_at_most,
            "peak_bytes": self.peak_bytes(workers),
            "notes": list(self.alignment.notes),
            "tensors": [
                {
                    "name": job.pair.name,
                    "kind": str(job.pair.kind),
                    "shape": list(job.pair.base.shape),
                    "if_changed": str(job.treatment),
                }
                for job in self.jobs
            ],
        }


def plan_extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: str | int = 16,
    rank_for: Mapping[str, str | int] | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
    targets: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    drop_rest: bool = False,
    exact: bool = False,
    seed: int = 0,
    base_model: str | None = None,
    overwrite: bool = False,
) -> ExtractPlan:
    """Read headers and decide what happens to every tensor. Nothing is written.

    rank_for: pattern → rank or rule, for the tensors it matches; the last match wins.
    targets: see layouts.targets. Raises InputError, DisagreementError, UsageError or OutputError,
    before any long work.
    """
    limits = RankLimits(min_rank, max_rank, multiple_of)
    rule = parse_rank_rule(str(rank), limits)
    special = {p: parse_rank_rule(str(r), limits) for p, r in (rank_for or {}).items()}
    target = resolve_device(device)
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not of the form owner/name")
    base_side, tuned_side = open_model(base), open_model(tuned)
    check_output(output, overwrite=overwrite, inputs=[base, tuned])
    alignment = align(
        base_side.checkpoint, tuned_side.checkpoint, base_side.config, tuned_side.config
    )
    pairs = list(alignment.pairs)
    check_floats(pairs)
    names = [pair.name for pair in pairs]
    chosen = select(names, include, exclude)
    if targets is not None:
        chosen &= targeted(targets, {pair.name: pair.kind for pair in pairs})
    select(names, list(special), ())  # a pattern that matches nothing is an error
    stored = _adapter_dtype(dtype, tuned_side)
    jobs = [
        ExtractJob(
            index,
            pair,
            _treatment(pair, alignment, base_side) if pair.name in chosen else Treatment.EXCLUDED,
            next((r for p, r in reversed(special.items()) if matches(p, pair.name)), rule),
            stored,
            target,
            seed,
            exact,
            scratch=None,
        )
        for index, pair in enumerate(pairs)
    ]
    _check_rank(jobs)
    plan = ExtractPlan(
        base_side,
        tuned_side,
        output,
        rule,
        stored,
        target,
        seed,
        base_model or base_side.config.hub_name,
        drop_rest,
        overwrite,
        alignment,
        tuple(jobs),
    )
    check_free_space(output, 2 * plan.adapter_bytes_at_most)
    return plan


def run_extract(
    plan: ExtractPlan, engine: Engine | None = None, progress: Progress | None = None
) -> ExtractReport:
    """Do the work of a plan and publish the adapter folder.

    Raises Unplaced when something that changed has no place in the output and the plan does not
    drop it, NothingMatches when nothing changed at all.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    with staged(plan.output) as staging:
        jobs = [replace(job, scratch=staging.scratch) for job in plan.jobs]
        results = engine.map(
            extract_tensor,
            jobs,
            cost=lambda job: job.cost,
            progress=progress,
            what="extracting",
        )
        rows = [_placed(result.row, plan) for result in results]
        _refuse_lost_changes(rows, plan)
        updates = _updates(plan, results)
        adapter = Adapter(
            updates,
            peft.NAME,
            base_model=plan.base_model,
            fan_in_fan_out=any(
                job.pair.kind is ModuleKind.CONV1D and job.pair.name in updates for job in jobs
            ),
            task_type=_task_type(plan, updates),
        )
        report = ExtractReport.of(
            rows,
            rank=str(plan.rule),
            dtype=plan.dtype.name,
            device=str(plan.device),
            seed=plan.seed,
            base_model=plan.base_model,
            base=_side(plan.base),
            tuned=_side(plan.tuned),
            notes=_notes(plan, updates),
            stored=_stored(updates),
        )
        modules = {module_of(job.pair.name) for job in jobs if job.pair.name.endswith(".weight")}
        if plan.alignment.tie is not None:
            modules.add(module_of(plan.alignment.tie.head))
        tensors, side_files = peft.encode(adapter, modules)
        write_tensors(staging.out / peft.WEIGHTS_FILE, tensors, {"format": "pt"})
        for name, content in side_files.items():
            (staging.out / name).write_bytes(content)
        (staging.out / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n")
        staging.publish(overwrite=plan.overwrite)
        return report


# One tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractResult:
    """A tensor's row, and its update where it has one."""

    row: TensorRow
    update: LowRankUpdate | None = None


def extract_tensor(job: ExtractJob) -> ExtractResult:
    """Compare one tensor and, where that is the plan, factorise and park its change."""
    pair = job.pair
    row = TensorRow(
        name=pair.name, kind=str(pair.kind), shape=pair.base.shape, status=Status.UNCHANGED
    )
    delta = read_delta(pair, job.device)
    if delta is None:
        return ExtractResult(row)
    row = replace(
        row,
        delta_norm=delta.norm,
        base_norm=delta.base_norm,
        noise_floor=delta.noise.threshold,
        changed_share=delta.changed_share,
    )
    if job.treatment is Treatment.WHOLE:
        return ExtractResult(replace(row, status=Status.WHOLE, relative_error=0.0))
    if job.treatment is not Treatment.LOW_RANK:
        status = Status.EXCLUDED if job.treatment is Treatment.EXCLUDED else Status.NO_PLACE
        return ExtractResult(replace(row, status=status))
    if job.rule.kind.name == "full":
        best = identity_factors(delta.matrix)
        row = replace(row, method="exact (W − W0 itself)", excess_bound=0.0, failure=0.0)
    else:
        factors = factorize(
            delta.matrix,
            job.rule,
            key=f"{job.seed}:{pair.name}",
            exact=job.exact,
            noise_floor=delta.noise.threshold,
        )
        best = factors.low_rank()
        answer = lora_rank(factors.spectrum, delta.noise, delta.changed_share)
        row = replace(
            row,
            method=factors.method,
            singular_values=tuple(factors.spectrum.values[: best.rank].tolist()),
            excess_bound=factors.bound.excess,
            failure=factors.bound.failure,
            lora_rank=answer.rank if answer else None,
            lora_tail=answer.tail if answer else None,
        )
    rank = best.rank
    if rank == 0:
        return ExtractResult(replace(row, status=Status.BELOW_RULE))
    value = _stored_value(pair.name, best, job.dtype)
    row = replace(
        row,
        status=Status.LOW_RANK,
        rank=rank,
        relative_error=residual_norm(delta.matrix, value) / delta.norm,
        clamped=job.rule.clamps(rank),
    )
    return ExtractResult(row, _park(job, value))


def _stored_value(name: str, value: LowRank, dtype: DType) -> LowRank:
    assert dtype.torch is not None
    stored = LowRank(value.b.to(dtype.torch), value.a.to(dtype.torch))
    for factor in (stored.b, stored.a):
        if not bool(torch.isfinite(factor).all()):
            raise RangeOverflow(
                f"{name}: a factor exceeds the range of {dtype.name}", hint="use --dtype float32"
            )
    return stored


def _park(job: ExtractJob, value: LowRank) -> LowRankUpdate:
    """Keep the factors on disk, as PEFT's module wants them: (out, r) and (r, in)."""
    assert job.scratch is not None
    is_embedding = job.pair.kind is ModuleKind.EMBEDDING
    if is_embedding or job.pair.kind is ModuleKind.CONV1D:
        value = value.T
    parked = park(job.scratch / f"{job.index}.raw", {"b": value.b, "a": value.a})
    rank = value.rank
    return LowRankUpdate(parked["b"], parked["a"], 1.0, float(rank), is_embedding)


# Planning and assembling ----------------------------------------------------------------------


def _adapter_dtype(text: str | None, tuned: Model) -> DType:
    if text is not None:
        if text not in USER_NAMES:
            raise UsageError(f"unknown dtype {text!r}", hint="choose float32, float16 or bfloat16")
        return USER_NAMES[text]
    sizes: dict[str, int] = {}
    for info in tuned.checkpoint.tensors.values():
        if info.dtype.name in ("F32", "F16", "BF16"):
            sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + info.nbytes
    return BY_NAME[max(sizes, key=lambda name: sizes[name])] if sizes else BY_NAME["F32"]


def _treatment(pair: Pair, alignment: Alignment, base: Model) -> Treatment:
    if not pair.base.dtype.is_float:
        return Treatment.NO_PLACE
    if _in_task_head(pair.name, base.config.task_type):
        return Treatment.WHOLE  # PEFT saves a task's head whole, whatever the config lists
    tie = alignment.tie
    if tie is not None and pair.name in (tie.embedding, tie.head):
        return Treatment.WHOLE  # the one form on which PEFT, its merge and ours agree
    if pair.kind in LOW_RANK_KINDS:
        return Treatment.LOW_RANK
    return Treatment.WHOLE if pair.kind in _STORABLE else Treatment.NO_PLACE


def _in_task_head(name: str, task_type: str | None) -> bool:
    return name.split(".")[0] in peft.TASK_HEADS.get(task_type or "", ())


def _check_rank(jobs: Sequence[ExtractJob]) -> None:
    """A fixed rank above a matrix's smaller side is clamped; above every matrix's it is a slip."""
    sides: dict[RankRule, int] = {}
    for job in jobs:
        if job.treatment is Treatment.LOW_RANK:
            sides[job.rule] = max(sides.get(job.rule, 0), min(_matrix_shape(job.pair)))
    if not sides:
        raise NothingMatches(
            "no matrix is left to factorise", hint="loosen --include, --exclude and --targets"
        )
    for rule, side in sides.items():
        if rule.clamps(side):
            raise UsageError(
                f"rank {rule} is above the smaller side of every matrix (at most {side})",
                hint="use --rank full to keep everything",
            )


def _matrix_shape(pair: Pair) -> tuple[int, int]:
    """(rows, columns) of the weight as a matrix; a kernel's columns are in·k…"""
    return pair.base.shape[0], pair.base.numel // max(1, pair.base.shape[0])


def _output_bytes(job: ExtractJob) -> int:
    if job.treatment is Treatment.WHOLE:
        return job.pair.tuned.nbytes
    if job.treatment is not Treatment.LOW_RANK:
        return 0
    rows, columns = _matrix_shape(job.pair)
    return job.rule.first_guess((rows, columns)) * (rows + columns) * job.dtype.bits // 8


def _job_memory(job: ExtractJob) -> int:
    float32 = 4 * job.pair.base.numel
    return job.cost + (2 * float32 if job.treatment is Treatment.LOW_RANK else float32)


def _placed(row: TensorRow, plan: ExtractPlan) -> TensorRow:
    if row.status is Status.NO_PLACE and plan.drop_rest:
        return replace(row, status=Status.DROPPED)
    if row.status is Status.WHOLE and plan.drop_rest:
        return replace(row, status=Status.DROPPED, relative_error=None)
    return row


def _refuse_lost_changes(rows: Sequence[TensorRow], plan: ExtractPlan) -> None:
    if all(row.status is Status.UNCHANGED for row in rows):
        raise NothingMatches(
            "base and tuned hold the same values: there is nothing to extract",
            hint="is TUNED the fine-tuned checkpoint?",
        )
    homeless = [row for row in rows if row.status is Status.NO_PLACE]
    if homeless:
        raise Unplaced(
            f"{len(homeless)} changed tensors have no place in a PEFT adapter",
            details=[f"{row.name} {list(row.shape)}" for row in homeless[:12]],
            hint="--drop-rest leaves them out and states their share of the change",
        )


def _updates(plan: ExtractPlan, results: Sequence[ExtractResult]) -> dict[str, Update]:
    by_name = {job.pair.name: job for job in plan.jobs}
    changed = {result.row.name: result for result in results}
    updates: dict[str, Update] = {}
    for name, result in changed.items():
        if result.update is not None:
            updates[name] = result.update
        elif result.row.status is Status.WHOLE and not plan.drop_rest:
            updates[name] = Replacement(by_name[name].pair.tuned)
    tie = plan.alignment.tie
    if tie is not None and tie.embedding in updates:
        updates[tie.head] = updates[tie.embedding]
    for name in list(updates):
        _complete_module(name, updates, by_name)
    return updates


def _task_type(plan: ExtractPlan, updates: dict[str, Update]) -> str | None:
    """The task for PEFT's config. PEFT insists on finding a task's whole head in the file, so
    the head is completed where part of it changed, and the task not named where none did."""
    task = plan.base.config.task_type
    head = [job.pair for job in plan.jobs if _in_task_head(job.pair.name, task)]
    if head and not any(pair.name in updates for pair in head):
        return None
    for pair in head:
        updates.setdefault(pair.name, Replacement(pair.tuned))
    return task


def _complete_module(
    name: str, updates: dict[str, Update], by_name: Mapping[str, ExtractJob]
) -> None:
    """A module stored whole is stored with its unchanged half too: PEFT copies whole modules."""
    partner = f"{module_of(name)}.bias"
    if name.endswith(".weight") and isinstance(updates[name], Replacement) and partner in by_name:
        updates.setdefault(partner, Replacement(by_name[partner].pair.tuned))
    weight = by_name.get(f"{module_of(name)}.weight")
    if name.endswith(".bias") and weight is not None and weight.pair.kind is ModuleKind.NORM:
        updates.setdefault(weight.pair.name, Replacement(weight.pair.tuned))


def _stored(updates: Mapping[str, Update]) -> tuple[int, int]:
    tensors: list[LazyTensor] = []
    for update in updates.values():
        tensors += [update.value] if isinstance(update, Replacement) else [update.b, update.a]
    infos = [tensor for tensor in tensors if isinstance(tensor, TensorInfo)]
    return sum(info.numel for info in infos), sum(info.nbytes for info in infos)


def _notes(plan: ExtractPlan, updates: Mapping[str, Update]) -> tuple[str, ...]:
    notes = list(plan.alignment.notes)
    if plan.alignment.ignored:
        names = ", ".join(plan.alignment.ignored[:3])
        notes.append(
            f"{len(plan.alignment.ignored)} constant buffers on one side ignored ({names})"
        )
    tie = plan.alignment.tie
    if tie is not None and tie.embedding in updates:
        notes.append(
            f"{tie.embedding} and {tie.head} are one tied matrix: stored whole under both names, "
            "the form in which PEFT's forward, PEFT's merge and loratool's merge agree"
        )
    if plan.base_model is None:
        notes.append("the base's Hub name is not known; --base-model owner/name records it")
    return tuple(notes)


def _side(model: Model) -> dict[str, Any]:
    return {
        "name": model.checkpoint.path.resolve().name,
        "tensors": len(model.checkpoint),
        "bytes": model.checkpoint.size_bytes,
        "fingerprint": fingerprint(model.checkpoint),
    }
