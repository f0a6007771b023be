"""From a base and a tuned checkpoint to a PEFT adapter, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, ModuleKind, Replacement, module_of
from loratool.algebra.budget import Allocation
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import NothingMatches, Unplaced
from loratool.ops.adapter_folder import write_adapter
from loratool.ops.base_check import samples_of
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_adapter import base_modules, build_adapter, stored_size
from loratool.ops.extract_biases import settled
from loratool.ops.extract_budget import spend
from loratool.ops.extract_early import Foreseen
from loratool.ops.extract_jobs import (
    ExtractJob,
    ExtractResult,
    Treatment,
    extract_tensor,
    read_ahead,
    resolve_spectrum,
)
from loratool.ops.extract_plan import ExtractPlan
from loratool.ops.extract_report import LEFT_OUT, ExtractReport, Status, TensorRow, factorised
from loratool.ops.extract_resume import keep, pending, resume_key
from loratool.ops.extract_rules import BUDGET_RANK
from loratool.ops.findings import rounding_notes
from loratool.ops.sources import Model
from loratool.plural import counted, first_of
from loratool.profiles import fit
from loratool.provenance import fingerprint
from loratool.report.text import percent
from loratool.stopwatch import Stopwatch
from loratool.storage.outputs import staged


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
        spectra = resolve_spectra(plan, engine, progress)
        jobs, allocation = spend(plan.jobs, spectra, plan.budget, plan.profile)
    key = resume_key(jobs, plan.into, (plan.base.config, plan.tuned.config))
    with (
        staged(plan.output, key) as staging,
        closing(Foreseen(plan, jobs, staging.out)) as early,
    ):
        staging.clear_out()
        jobs = [replace(job, scratch=staging.scratch) for job in jobs]
        results = settled(_results(jobs, early, engine, progress))
        tied = plan.alignment.repeats
        rows = [
            replace(_placed(result.row, plan), tied_to=tied.get(result.row.name))
            for result in results
        ]
        _refuse_lost_changes(rows, plan.jobs)
        adapter = build_adapter(
            plan.alignment,
            [replace(result, row=row) for result, row in zip(results, rows, strict=True)],
            task_type=plan.base.config.task_type,
            base_model=plan.base_model,
        )
        _refuse_nothing(adapter, rows)
        fitted = fit(adapter, plan.profile, str(plan.seed))
        report = ExtractReport.of(
            rows,
            rank=plan.rank,
            dtype=plan.dtype.name,
            device=str(plan.device),
            seed=plan.seed,
            base_model=plan.base_model,
            base=_side(plan.base)
            | {"samples": samples_of(job.pair.base for job in jobs if _is_in(job, adapter))},
            tuned=_side(plan.tuned),
            notes=(*_notes(plan, adapter, allocation, rows), *fitted.notes),
            stored=stored_size(fitted.adapter),
        )
        stopwatch = Stopwatch.sum(result.seconds for result in results)
        with stopwatch.stage("write"):
            modules = base_modules(plan.alignment)
            write_adapter(staging.out, fitted.adapter, report.to_json(), modules, early=early.file)
            staging.publish(overwrite=plan.overwrite)
        spent = Stopwatch.sum((stopwatch.seconds, {"write": early.seconds}))
        return replace(report, seconds=spent.seconds)


def _results(
    jobs: Sequence[ExtractJob], early: Foreseen, engine: Engine, progress: Progress
) -> list[ExtractResult]:
    """What becomes of each tensor, in the jobs' order; ``early`` is told as soon as it is known.

    Those that an earlier run finished are taken over, and took no time.
    """
    done, left = pending(jobs)
    for job in jobs:
        if job.index in done:
            early.see(job, done[job.index])

    def work(job: ExtractJob) -> ExtractResult:
        result = extract_and_keep(job)
        early.see(job, result)
        return result

    new = engine.map(
        work,
        left,
        cost=lambda job: job.cost,
        progress=progress,
        what="extracting",
        ahead=read_ahead,
        urgent=early.awaits,
    )
    done |= {job.index: result for job, result in zip(left, new, strict=True)}
    return [done[job.index] for job in jobs]


def extract_and_keep(job: ExtractJob) -> ExtractResult:
    """One tensor, recorded for a run that may have to go on from here."""
    stopwatch = Stopwatch()
    result = extract_tensor(job, stopwatch)
    with stopwatch.stage("write"):
        keep(job, result)
    return replace(result, seconds=stopwatch.seconds)


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
        ahead=read_ahead,
    )
    return {
        job.pair.name: spectrum
        for job, spectrum in zip(plan.jobs, spectra, strict=True)
        if spectrum is not None
    }


def _placed(row: TensorRow, plan: ExtractPlan) -> TensorRow:
    if row.status is Status.NO_PLACE and plan.drop_rest:
        return replace(row, status=Status.DROPPED)
    if row.status in (Status.WHOLE, Status.NEW_ROWS) and plan.drop_rest:
        return replace(row, status=Status.DROPPED, relative_error=None)
    return row


def _refuse_lost_changes(rows: Sequence[TensorRow], jobs: Sequence[ExtractJob]) -> None:
    if all(row.status is Status.UNCHANGED for row in rows):
        raise NothingMatches(
            "base and tuned hold the same values: there is nothing to extract",
            hint="is TUNED the fine-tuned checkpoint?",
        )
    homeless = [row for row in rows if row.status is Status.NO_PLACE]
    if homeless:
        raise Unplaced(
            f"{counted(len(homeless), 'changed tensor has', 'changed tensors have')} no place in a "
            "PEFT adapter",
            details=[f"{row.name} {list(row.shape)}" for row in homeless[:12]],
            hint="--exclude takes a name or pattern to leave out; --drop-rest leaves out "
            "everything that is not low-rank and states its share of the change"
            + _storing_whole(homeless, jobs),
        )


def _storing_whole(homeless: Sequence[TensorRow], jobs: Sequence[ExtractJob]) -> str:
    """How the first of these is stored that has a place once the matrices beside it are whole."""
    for row in homeless:
        owner = module_of(row.name)
        inside = [job for job in jobs if owner and job.pair.name.startswith(f"{owner}.")]
        beside = [job for job in inside if job.treatment is Treatment.LOW_RANK]
        if beside and not any(job.pair.kind is ModuleKind.EXPERT for job in beside):
            return f"; --rank-for {owner}=whole stores {row.name} with its whole module"
    return ""


def _refuse_nothing(adapter: Adapter, rows: Sequence[TensorRow]) -> None:
    if adapter.updates:
        return
    counts = {status: sum(row.status is status for row in rows) for status in LEFT_OUT}
    raise NothingMatches(
        "no change is left to store",
        details=[
            f"{counted(count, 'changed tensor')}: {status}"
            for status, count in counts.items()
            if count
        ],
        hint="loosen --rank, --include, --exclude and --targets; --drop-rest stores factors alone",
    )


def _notes(
    plan: ExtractPlan,
    adapter: Adapter,
    allocation: Allocation | None,
    rows: Sequence[TensorRow],
) -> tuple[str, ...]:
    notes = [*plan.notes, *rounding_notes(factorised(rows))]
    notes += _not_measured_note(rows)
    notes += _token_notes(plan, rows)
    if plan.into is not None:
        notes += _into_notes(plan.jobs, rows)
    if plan.alignment.ignored:
        names = ", ".join(plan.alignment.ignored[:3])
        notes.append(
            f"{counted(len(plan.alignment.ignored), 'constant buffer')} on one side ignored "
            f"({names})"
        )
    notes += [
        f"{' and '.join(tie.names)} are tied: stored whole under every name, the form in which "
        "PEFT's forward, PEFT's merge and loratool's merge agree"
        for tie in plan.alignment.ties
        if isinstance(adapter.updates.get(tie.main), Replacement)
    ]
    apart = [name for name in plan.alignment.untied if name in adapter.factors]
    if apart:
        notes.append(
            f"{' and '.join(plan.alignment.untied)} are one matrix in the base and two in tuned: "
            "PEFT computes with both updates, but its merge_and_unload adds them to the one; "
            "loratool merge --untie stores two"
        )
    if allocation is not None:
        notes += _budget_notes(plan, allocation, rows)
    if plan.base_model is None:
        notes.append("the base's Hub name is not known; --base-model owner/name records it")
    return tuple(notes)


def _budget_notes(
    plan: ExtractPlan, allocation: Allocation, rows: Sequence[TensorRow]
) -> list[str]:
    shared = factorised(rows)
    energy = sum(row.energy if row.rest_norm is None else row.rest_norm**2 for row in shared)
    how = f"to within {percent(allocation.loss / energy)} of Σ‖D‖²" if energy else "exactly"
    spent = f"was spent {how if allocation.loss else 'exactly'} where it lowers the error most"
    if plan.profile.limits.one_rank:
        spent = f"went into one rank for all matrices, which {plan.profile.name} wants"
    notes = [
        f"the budget of {counted(plan.budget or 0, 'parameter')} {spent}; "
        f"{allocation.used:,} are used"
    ]
    unlimited = {job.pair.name for job in plan.jobs if job.rule.limits.most is None}
    full = [
        row
        for row in shared
        if row.name in unlimited
        and (row.rank or 0) - (row.kept_rank or 0) == BUDGET_RANK < min(matrix_shape(row.shape))
    ]
    if full:
        notes.append(
            f"{counted(len(full), 'matrix has', 'matrices have')} the largest rank that a budget "
            f"chooses, {BUDGET_RANK}: --max-rank allows it a larger one"
        )
    return notes


def _not_measured_note(rows: Sequence[TensorRow]) -> list[str]:
    names = [row.name for row in rows if row.status is Status.NOT_MEASURED]
    if not names:
        return []
    return [
        f"excluded and not measured, for NaN, infinity or a change beyond float32's range: "
        f"{first_of(names)}; no share and no total counts their change"
    ]


def _token_notes(plan: ExtractPlan, rows: Sequence[TensorRow]) -> list[str]:
    """What to do about tokens that tuned has beyond the base's."""
    grown = [row for row in rows if row.added_rows]
    lost = [row for row in grown if row.status in LEFT_OUT]
    notes = []
    if lost:
        names = " and ".join(row.name for row in lost)
        tokens = counted(
            lost[0].added_rows, "token that tuned added is", "tokens that tuned added are"
        )
        notes.append(f"the {tokens} left out with {names}")
    if len(lost) < len(grown):
        all_tokens = grown[0].shape[0] + grown[0].added_rows
        notes.append(f"before loading the adapter, model.resize_token_embeddings({all_tokens})")
    return notes


def _into_notes(jobs: Sequence[ExtractJob], rows: Sequence[TensorRow]) -> list[str]:
    continued = [row for row in rows if row.rest_norm is not None]
    energy = sum(row.energy for row in continued)
    rest = sum((row.rest_norm or 0.0) ** 2 for row in continued)
    notes = []
    if rest > energy:
        notes.append(
            "the adapter of --into explains nothing of the change: without it, less is left. Is "
            "it of these checkpoints?"
        )
    elif energy:
        notes.append(
            f"the adapter of --into alone explains {percent(1 - rest / energy)} of the energy of "
            f"the {counted(len(continued), 'matrix', 'matrices')} that it changes"
        )
    started = {job.pair.name for job in jobs if job.start is not None}
    idle = [row.name for row in rows if row.status is Status.UNCHANGED and row.name in started]
    if idle:
        notes.append(
            f"left out, for no change of their tensors: {counted(len(idle), 'update')} of --into "
            f"({', '.join(idle[:3])})"
        )
    return notes


def _is_in(job: ExtractJob, adapter: Adapter) -> bool:
    return job.pair.name in adapter.updates


def _side(model: Model) -> dict[str, Any]:
    return {
        "name": model.checkpoint.path.resolve().name,
        "tensors": len(model.checkpoint),
        "bytes": model.checkpoint.size_bytes,
        "fingerprint": fingerprint(model.checkpoint),
    }
