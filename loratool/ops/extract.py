"""From a base and a tuned checkpoint to a PEFT adapter, with every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, ModuleKind
from loratool.algebra.budget import Allocation, allocate, parse_size
from loratool.algebra.ranks import RankLimits, RankRule, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NothingMatches, Unplaced, UsageError
from loratool.formats import peft
from loratool.layouts.config import is_hub_id
from loratool.layouts.pairs import Alignment, Pair, align, check_floats
from loratool.layouts.patterns import matches, select
from loratool.layouts.targets import targeted
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_adapter import base_modules, build_adapter, in_task_head, stored_size
from loratool.ops.extract_jobs import (
    ExtractJob,
    ExtractResult,
    Treatment,
    extract_tensor,
    resolve_spectrum,
)
from loratool.ops.extract_report import ExtractReport, Status, TensorRow
from loratool.ops.extract_resume import keep, pending, resume_key
from loratool.ops.sources import Model, open_model
from loratool.profiles import Profile, find_profile, fit
from loratool.provenance import REPORT_FILE, fingerprint
from loratool.storage.dtypes import BY_NAME, USER_NAMES, DType
from loratool.storage.outputs import check_free_space, check_output, staged
from loratool.storage.writing import write_tensors

LOW_RANK_KINDS = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.EMBEDDING)
BUDGET_RANK = 256
"""Components per matrix that a budget chooses among, unless --max-rank says otherwise."""

_STORABLE = (ModuleKind.NORM, ModuleKind.BIAS, ModuleKind.POSITION, ModuleKind.CONV)
_BUDGET = "budget:"


@dataclass(frozen=True)
class ExtractPlan:
    """Everything decided before a tensor is read."""

    base: Model
    tuned: Model
    output: Path
    rank: str
    budget: int | None
    dtype: DType
    device: torch.device
    seed: int
    base_model: str | None
    profile: Profile
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
        whole = sum(j.output_bytes_at_most for j in self.jobs if j.treatment is Treatment.WHOLE)
        if self.budget is not None:
            return whole + self.budget * self.dtype.bits // 8
        return sum(job.output_bytes_at_most for job in self.jobs)

    def peak_bytes(self, workers: int) -> int:
        """Working memory: the largest jobs that can run side by side."""
        return sum(sorted((job.memory_bytes for job in self.jobs), reverse=True)[:workers])

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            "rank": self.rank,
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
    profile: str = "peft",
    overwrite: bool = False,
) -> ExtractPlan:
    """Read headers and decide what happens to every tensor. Nothing is written.

    rank_for: pattern → rank or rule, for the tensors it matches; the last match wins.
    targets: see layouts.targets. Raises InputError, DisagreementError, UsageError or OutputError,
    before any long work.
    """
    is_budget = str(rank).startswith(_BUDGET)
    if is_budget and (min_rank > 1 or multiple_of > 1):
        raise UsageError("a budget goes with --max-rank, not with --min-rank or --multiple-of")
    limits = RankLimits(min_rank, max_rank, multiple_of)
    if is_budget:
        rule = parse_rank_rule(str(max_rank or BUDGET_RANK))
    else:
        rule = parse_rank_rule(str(rank), limits)
    special = {p: parse_rank_rule(str(r), limits) for p, r in (rank_for or {}).items()}
    target = resolve_device(device)
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not of the form owner/name")
    base_side, tuned_side = open_model(base), open_model(tuned)
    check_output(output, overwrite=overwrite, inputs=[*base_side.paths, *tuned_side.paths])
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
    budget = _budget(str(rank), stored, base_side) if is_budget else None
    if budget is None:
        _check_rank(jobs)
    plan = ExtractPlan(
        base_side,
        tuned_side,
        output,
        str(rank) if is_budget else str(rule),
        budget,
        stored,
        target,
        seed,
        base_model or base_side.config.hub_name,
        find_profile(profile),
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
    jobs, allocation = list(plan.jobs), None
    if plan.budget is not None:
        jobs, allocation = _spend(plan, plan.budget, engine, progress)
    with staged(plan.output, resume_key(jobs)) as staging:
        jobs = [replace(job, scratch=staging.scratch) for job in jobs]
        done, left = pending(jobs)
        new = engine.map(
            extract_and_keep,
            left,
            cost=lambda job: job.cost,
            progress=progress,
            what="extracting",
        )
        done |= {job.index: result for job, result in zip(left, new, strict=True)}
        results = [done[job.index] for job in jobs]
        results = [replace(result, row=_placed(result.row, plan)) for result in results]
        rows = [result.row for result in results]
        _refuse_lost_changes(rows)
        adapter = build_adapter(
            plan.alignment,
            results,
            task_type=plan.base.config.task_type,
            base_model=plan.base_model,
        )
        fitted = fit(adapter, plan.profile, str(plan.seed))
        report = ExtractReport.of(
            rows,
            rank=plan.rank,
            dtype=plan.dtype.name,
            device=str(plan.device),
            seed=plan.seed,
            base_model=plan.base_model,
            base=_side(plan.base),
            tuned=_side(plan.tuned),
            notes=(*_notes(plan, adapter, allocation), *fitted.notes),
            stored=stored_size(fitted.adapter),
        )
        tensors, side_files = peft.encode(fitted.adapter, base_modules(plan.alignment))
        write_tensors(staging.out / peft.WEIGHTS_FILE, tensors, {"format": "pt"})
        for name, content in side_files.items():
            (staging.out / name).write_bytes(content)
        (staging.out / REPORT_FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n")
        staging.publish(overwrite=plan.overwrite)
        return report


def extract_and_keep(job: ExtractJob) -> ExtractResult:
    """One tensor, recorded for a run that may have to go on from here."""
    result = extract_tensor(job)
    keep(job, result)
    return result


def resolve_spectra(
    plan: ExtractPlan, engine: Engine | None = None, progress: Progress | None = None
) -> dict[str, Spectrum]:
    """The spectra that the plan's rules look at, by tensor; nothing is written."""
    spectra = (engine or Engine()).map(
        resolve_spectrum,
        plan.jobs,
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="reading spectra",
    )
    return {
        job.pair.name: spectrum
        for job, spectrum in zip(plan.jobs, spectra, strict=True)
        if spectrum is not None
    }


def _spend(
    plan: ExtractPlan, parameters: int, engine: Engine, progress: Progress
) -> tuple[list[ExtractJob], Allocation]:
    """Jobs with the ranks that the budget gives them: one pass over the checkpoints of its own."""
    spectra = resolve_spectra(plan, engine, progress)
    allocation = allocate(list(spectra.values()), parameters)
    ranks = dict(zip(spectra, allocation.ranks, strict=True))
    jobs = []
    for job in plan.jobs:
        rank = ranks.get(job.pair.name)
        if rank is None:
            jobs.append(job)
        elif rank == 0:
            jobs.append(replace(job, treatment=Treatment.NO_BUDGET))
        else:
            jobs.append(replace(job, rule=parse_rank_rule(str(rank))))
    return jobs, allocation


# Planning -------------------------------------------------------------------------------------


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
    if in_task_head(pair.name, base.config.task_type):
        return Treatment.WHOLE  # PEFT saves a task's head whole, whatever the config lists
    if any(pair.name in tie.names for tie in alignment.ties):
        return Treatment.WHOLE  # the one form on which PEFT, its merge and ours agree
    if alignment.experts.is_expert(pair.name):
        return Treatment.NO_PLACE
    if pair.kind in LOW_RANK_KINDS:
        whole = alignment.experts.is_saved_whole(pair.name)
        return Treatment.WHOLE if whole else Treatment.LOW_RANK
    return Treatment.WHOLE if pair.kind in _STORABLE else Treatment.NO_PLACE


def _budget(rank: str, dtype: DType, base: Model) -> int:
    """Parameters that a budget allows. Raises UsageError."""
    text = rank.removeprefix(_BUDGET)
    values = sum(info.numel for info in base.checkpoint.tensors.values())
    parameters = parse_size(text, dtype.bits // 8, values)
    if not parameters:
        raise UsageError(
            f"rank {rank!r}: a budget is a number of parameters, a size or a share of the base",
            hint="for example budget:500000, budget:20MB, budget:2%",
        )
    return parameters


def _check_rank(jobs: Sequence[ExtractJob]) -> None:
    """A fixed rank above a matrix's smaller side is clamped; above every matrix's it is a slip."""
    sides: dict[RankRule, int] = {}
    for job in jobs:
        if job.treatment is Treatment.LOW_RANK:
            sides[job.rule] = max(sides.get(job.rule, 0), min(matrix_shape(job.pair.base.shape)))
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


def _placed(row: TensorRow, plan: ExtractPlan) -> TensorRow:
    if row.status is Status.NO_PLACE and plan.drop_rest:
        return replace(row, status=Status.DROPPED)
    if row.status is Status.WHOLE and plan.drop_rest:
        return replace(row, status=Status.DROPPED, relative_error=None)
    return row


def _refuse_lost_changes(rows: Sequence[TensorRow]) -> None:
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
            hint="--exclude takes a name or pattern to leave out; --drop-rest leaves out "
            "everything that is not low-rank and states its share of the change",
        )


def _notes(plan: ExtractPlan, adapter: Adapter, allocation: Allocation | None) -> tuple[str, ...]:
    notes = list(plan.alignment.notes)
    if plan.alignment.ignored:
        names = ", ".join(plan.alignment.ignored[:3])
        notes.append(
            f"{len(plan.alignment.ignored)} constant buffers on one side ignored ({names})"
        )
    notes += [
        f"{' and '.join(tie.names)} are tied: stored whole under every name, the form in which "
        "PEFT's forward, PEFT's merge and loratool's merge agree"
        for tie in plan.alignment.ties
        if tie.main in adapter.updates
    ]
    if allocation is not None:
        how = "exactly" if not allocation.loss else f"to within {allocation.loss:.2e} of Σ‖D‖²"
        notes.append(
            f"the budget of {plan.budget:,} parameters was spent {how} where it lowers the error "
            f"most; {allocation.used:,} are used"
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
