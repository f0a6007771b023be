"""Several adapters into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratool.adapter import Adapter, Update
from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import NothingMatches
from loratool.formats import peft
from loratool.ops.adapter_folder import write_encoded
from loratool.ops.combine_biases import combine_biases
from loratool.ops.combine_jobs import CombineResult, combine_weight
from loratool.ops.combine_overlap import Overlap, overlap_of
from loratool.ops.combine_plan import CombinePlan, plan_combine
from loratool.ops.combine_report import UpdateRow, UpdatesReport
from loratool.ops.combine_weights import names_of
from loratool.ops.extract_adapter import stored_size
from loratool.ops.stacks import at_one_rank, completed
from loratool.plural import counted
from loratool.storage.outputs import staged


def run_combine(
    plan: CombinePlan,
    engine: Engine | None = None,
    progress: Progress | None = None,
    search: Mapping[str, Any] | None = None,
) -> UpdatesReport:
    """Do the work of a plan and publish the adapter folder.

    search: how the weights were found, for the report. Nested recipes are made first, in a folder
    beside the output that is removed afterwards. Raises NothingMatches when the combination is
    zero everywhere.
    """
    if plan.nested:
        return _run_nested(plan, engine, progress, search)
    with staged(plan.output) as staging:
        results = (engine or Engine()).map(
            combine_weight,
            [replace(job, scratch=staging.scratch) for job in plan.jobs],
            cost=lambda job: job.cost,
            progress=progress or NoProgress(),
            what="combining",
        )
        adapter, bias_rows = _adapter(plan, results)
        encoded = plan.format.encode(adapter)
        overlap, repeats = _overlap(plan, results)
        facts = plan.facts() | {"overlap": overlap.to_json()}
        report = UpdatesReport(
            "combine",
            (*(result.row for result in results), *bias_rows),
            facts | ({"search": dict(search)} if search else {}),
            (*plan.notes, *_zero_notes(results), *repeats, *encoded.notes),
            *stored_size(adapter),
        )
        write_encoded(staging.out, encoded, report.to_json())
        staging.publish(overwrite=plan.overwrite)
        return report


def _run_nested(
    plan: CombinePlan,
    engine: Engine | None,
    progress: Progress | None,
    search: Mapping[str, Any] | None,
) -> UpdatesReport:
    with staged(plan.output.with_name(f"{plan.output.name}-nested")) as staging:
        sources = list(plan.asked.sources)
        for place, nested in plan.nested.items():
            made = staging.scratch / str(place) / sources[place].path.name
            run_combine(replace(nested, output=made), engine, progress)
            sources[place] = replace(sources[place], path=made, recipe=None)
        asked = replace(plan.asked, sources=tuple(sources))
        flat = plan_combine(asked, plan.output, device=str(plan.device), overwrite=plan.overwrite)
        return run_combine(flat, engine, progress, search)


def _adapter(
    plan: CombinePlan, results: list[CombineResult]
) -> tuple[Adapter, tuple[UpdateRow, ...]]:
    """The result, and the rows of its biases."""
    low_rank = {r.row.name: r.update for r in results if r.update is not None}
    names = [job.name for job in plan.jobs]
    biases = combine_biases(plan, low_rank)
    if not biases.low_rank:
        raise NothingMatches(
            "the combination is zero everywhere; there is no adapter to write",
            hint="do the weights cancel each other?",
        )
    key = str(plan.asked.seed)
    together = completed(biases.low_rank, names, key)
    if plan.format.one_alpha:
        together = at_one_rank(together, key)
    updates: dict[str, Update] = {**plan.replaced, **biases.updates, **together}
    first = plan.adapters[0]
    tasks = {adapter.task_type for adapter in plan.adapters}
    adapter = Adapter(
        updates,
        peft.NAME,
        base_model=next((a.base_model for a in plan.adapters if a.base_model), None),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in plan.adapters),
        task_type=first.task_type if len(tasks) == 1 else None,
        as_parameters=frozenset[str]().union(*(a.as_parameters for a in plan.adapters)),
    )
    return adapter, biases.rows


def _overlap(plan: CombinePlan, results: list[CombineResult]) -> tuple[Overlap, list[str]]:
    """What the adapters share, and what there is to say about it where they are added up."""
    factor = float(plan.parameters.get("lambda", 1.0))
    weights = [[factor * weight for weight in result.row.weights] for result in results]
    overlap = overlap_of([result.products for result in results], weights)
    adds_up = plan.method.is_sum and not plan.parameters.get("normalize", False)
    return overlap, overlap.notes(names_of(plan.asked.sources)) if adds_up else []


def _zero_notes(results: list[CombineResult]) -> list[str]:
    zero = [result.row.name for result in results if result.update is None]
    return (
        [f"{counted(len(zero), 'weight')} came out as zero, and absent ({zero[0]})"] if zero else []
    )
