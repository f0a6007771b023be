"""What ``loratool extract`` prints: the plan, the choice of ranks, the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from loratool.cli.output import Output, fitting
from loratool.engine import Engine
from loratool.layouts.families import by_name, family_of
from loratool.ops.extract_jobs import Treatment
from loratool.ops.extract_plan import ExtractPlan
from loratool.ops.extract_report import LEFT_OUT, ExtractReport, Status, TensorRow
from loratool.ops.extract_tradeoff import rank_tradeoff
from loratool.plural import counted
from loratool.provenance import document
from loratool.report.text import percent, size_text


def show_ranks(out: Output, plan: ExtractPlan, engine: Engine, max_rank: int | None) -> None:
    """What each rank would cost and keep; reads the spectra."""
    tradeoff = rank_tradeoff(plan, max_rank=max_rank, engine=engine, progress=out.progress())
    if out.as_json:
        out.document(tradeoff.to_json())
        return
    if not tradeoff.matrices:
        out.line("no matrix that would be factorised has changed")
        return
    out.table(
        f"{counted(tradeoff.matrices, 'changed matrix', 'changed matrices')}, factors in "
        f"{plan.dtype.name}",
        ["rank", "parameters", "size", "error", "energy kept", "error as a budget"],
        [
            [
                str(row.rank),
                f"{row.parameters:,}",
                size_text(row.nbytes),
                percent(row.error),
                percent(1 - row.error**2),
                percent(row.budget_error),
            ]
            for row in tradeoff.rows
        ],
        text=0,
    )
    if plan.into is not None:
        out.line("of what the adapter of --into leaves of the change")
    if len({job.rule for job in plan.jobs if job.treatment is Treatment.LOW_RANK}) > 1:
        out.line("one rank for all of them: --rank-for and --conv-rank are not in the table")
    if any(job.dora for job in plan.jobs):
        out.line("of a LoRA: what --dora makes of these ranks is not in the table")
    out.line("error: ‖D − D_r‖ / ‖D‖ over these matrices, before the factors are rounded")
    out.line("as a budget: the same size by --rank budget:SIZE, spent where it helps most")


def show_plan(out: Output, plan: ExtractPlan, engine: Engine) -> None:
    """What would happen, from headers alone."""
    if out.as_json:
        out.document(document("extract-plan", 1, plan.to_json(engine.workers)))
        return
    counts: dict[str, int] = defaultdict(int)
    for job in plan.jobs:
        counts[plan.if_changed(job)] += 1
    out.line(f"would extract at rank {plan.rank} in {plan.dtype.name} on {plan.device}")
    out.table(
        "if they changed",
        ["treatment", "tensors"],
        [[treatment, str(count)] for treatment, count in counts.items()],
    )
    out.line(f"reads {size_text(plan.read_bytes)}")
    at_most = plan.forecast
    out.line(f"adapter: at most {size_text(at_most.bytes_at_most)}")
    out.line(f"working memory: about {size_text(plan.peak_bytes(engine.workers))}")
    out.notes((*plan.notes, *at_most.notes))


def show_report(out: Output, report: ExtractReport, output: Path) -> None:
    """What was done, by families of modules, or (verbose) by tensors."""
    low_rank = [row for row in report.rows if row.status is Status.LOW_RANK]
    if out.verbose:
        out.table(
            "every tensor",
            [
                "tensor",
                "status",
                "shape",
                "rank",
                "error",
                "excess ≤",
                "energy kept",
                "share of change",
            ],
            [_tensor_cells(row, report) for row in by_name(report.rows)],
            text=2,
        )
        out.line("seconds, added up over the workers: " + _stages(report.seconds))
    lines = _family_lines(low_rank, report)
    columns = fitting(out.width, lines, _ORDER, ("module", "rank", "error"), _BY_WORTH)
    title = f"{output}: rank {report.rank}, {report.dtype}, computed on {report.device}"
    if lines:
        out.table(title, columns, [[line[column] for column in columns] for line in lines])
    else:
        out.line(f"{title}; no matrix is factorised")
    for status in (Status.WHOLE, Status.DIFFERENCE, Status.NEW_ROWS, *LEFT_OUT):
        rows = [row for row in report.rows if row.status is status]
        if rows:
            share = _share(sum(row.energy for row in rows), report)
            what = f"{percent(share)} of the change's energy"
            if status is Status.NEW_ROWS:
                what = f"{counted(rows[0].added_rows, 'token')} added"
            if status is Status.NOT_MEASURED:
                what = "of unknown size"
            out.line(f"{status}: {_kinds(rows)} ({what})")
    if unchanged := report.count(Status.UNCHANGED):
        out.line(f"unchanged: {counted(unchanged, 'tensor')}")
    out.line(
        f"base + adapter gives back {percent(1 - report.relative_error**2)} of the change's "
        f"energy (relative error {percent(report.relative_error)})"
    )
    values = counted(report.adapter_parameters, "value")
    out.line(f"adapter: {values}, {size_text(report.adapter_bytes)} in {output}")
    if summary := report.lora_summary():
        out.line(summary)
    out.notes(report.notes)


def _share(energy: float, report: ExtractReport) -> float:
    return energy / report.energy if report.energy else 0.0


def _tensor_cells(row: TensorRow, report: ExtractReport) -> list[str]:
    return [
        row.name,
        str(row.status),
        "×".join(map(str, row.shape)),
        _rank_cell(row),
        percent(row.relative_error),
        percent(row.excess_bound),
        percent(row.energy_kept),
        "tied" if row.tied_to else percent(_share(row.energy, report)),
    ]


def _rank_cell(row: TensorRow) -> str:
    if row.rank is None:
        return ""
    kept = "" if row.kept_rank is None else f" ({row.kept_rank} kept)"
    return f"{row.rank}{kept}{' (clamped)' if row.clamped else ''}"


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())


_ORDER = ("module", "tensors", "rank", "error", "energy kept", "share of change")
_BY_WORTH = ("share of change", "tensors", "energy kept")


def _family_lines(rows: list[TensorRow], report: ExtractReport) -> list[dict[str, str]]:
    families: dict[str, list[TensorRow]] = defaultdict(list)
    for row in by_name(rows):
        families[family_of(row.name).removesuffix(".weight")].append(row)
    lines = []
    for family, members in families.items():
        energy = sum(row.energy for row in members)
        kept = sum(row.energy * (row.energy_kept or 0.0) for row in members) / energy
        ranks = sorted({row.rank or 0 for row in members})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        error = max(1 - kept, 0.0) ** 0.5
        cells = [family, str(len(members)), span, percent(error), percent(kept)]
        lines.append(dict(zip(_ORDER, [*cells, percent(_share(energy, report))], strict=True)))
    return lines


def _kinds(rows: list[TensorRow]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.kind] += 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
