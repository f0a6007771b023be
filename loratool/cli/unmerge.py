"""``loratool unmerge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.layouts.families import by_name
from loratool.plural import counted
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.unmerge import UnmergePlan
    from loratool.ops.unmerge_report import UnmergeReport


@click.command("unmerge")
@click.argument("merged", type=options.PATH)
@click.argument(
    "adapters", type=options.WEIGHTED, nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]..."
)
@options.output_option
@options.receipt_option
@options.alpha_option
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def unmerge_command(
    out: Output,
    merged: Path,
    adapters: tuple[tuple[Path, float], ...],
    output: Path,
    receipt: Path | None,
    alpha: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Take adapters out of MERGED again.

    With the receipt that merge --receipt left, the result is the base bit for bit, checked by its
    hashes. Without one it is the nearest to it, and the report says for how many weights that
    need not be the base's; give --include and --exclude as for the merge then.

    \b
    Example:
      loratool unmerge merged/ adapter/ -o base/
      loratool unmerge merged/ style/:0.7 facts/:0.3 -o base/
    """
    from loratool.engine import Engine
    from loratool.ops.unmerge import plan_unmerge, run_unmerge
    from loratool.provenance import document

    plan = plan_unmerge(
        merged,
        adapters,
        output,
        receipt=receipt,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        overwrite=overwrite,
    )
    if dry_run:
        if out.as_json:
            out.document(document("unmerge-plan", 1, plan.to_json()))
        else:
            _show_plan(out, plan)
        return
    result = run_unmerge(plan, Engine(jobs) if jobs else Engine(), out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result, output)


def _show_plan(out: Output, plan: UnmergePlan) -> None:
    how = f"exactly, by {plan.receipt_path}" if plan.receipt else "to the nearest: no receipt"
    out.line(
        f"would restore {counted(len(plan.updates), 'tensor')} {how} "
        f"({size_text(plan.output_bytes)}) on {plan.device}"
    )
    out.notes(plan.notes)


def _show(out: Output, report: UnmergeReport, output: Path) -> None:
    if out.verbose:
        column = "corrected" if report.exact else "uncertain"
        out.table(
            "restored tensors",
            ["tensor", "elements", column, "share"],
            [
                [
                    row.name,
                    f"{row.elements:,}",
                    f"{getattr(row, column):,}",
                    percent(getattr(row, column) / max(1, row.elements)),
                ]
                for row in by_name(report.rows)
            ],
        )
    tensors = f"{len(report.rows)} of {counted(report.facts['tensors_total'], 'tensor')}"
    if report.exact:
        out.line(f"{output} is the base, bit for bit: {tensors} restored, all hashes agree")
    else:
        out.line(f"{output}: {tensors} restored to the nearest, without a receipt")
        out.line(
            f"{percent(report.uncertain_share)} of their weights need not be the base's: other "
            "values merge to the same, or none does"
        )
    out.notes(report.facts["notes"])
