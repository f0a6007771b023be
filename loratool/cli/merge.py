"""``loratool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, percent, size_text

if TYPE_CHECKING:
    from loratool.engine import Engine
    from loratool.ops.merge import MergePlan
    from loratool.ops.merge_report import MergeReport


@click.command("merge")
@click.argument("base", type=options.PATH)
@click.argument(
    "adapters", type=options.WEIGHTED, nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]..."
)
@options.output_option
@click.option(
    "--scale",
    type=options.FINITE,
    default=1.0,
    show_default=True,
    help="Multiplies all weights, and with them the adapters' own alpha/r.",
)
@click.option(
    "--dtype",
    metavar="float32|float16|bfloat16",
    help="Dtype of every float tensor of the output [default: the base's].",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="New shards of at most SIZE (5GB, 500MiB) [default: the base's files].",
)
@click.option(
    "--base-check",
    is_flag=True,
    help="Refuse a base that is not the one the adapter records; else that is a note.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Hard links to the base's files, instead of copies, for those that stay as they are.",
)
@options.alpha_option
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def merge_command(
    out: Output,
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    output: Path,
    scale: float,
    dtype: str | None,
    max_shard_size: str | None,
    base_check: bool,
    link: bool,
    alpha: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Merge ADAPTERs into BASE: W = W0 + Σ s·B·A, each weight correctly rounded.

    The result has the base's files, shards, names and dtypes, its tokenizer and config; only the
    adapted tensors change. The same inputs give the same bytes on every machine. Several adapters
    are added up before anything is rounded. A killed merge goes on where it was: run it again.

    \b
    Example:
      loratool merge base/ adapter/ -o merged/
      loratool merge base/ style/:0.7 subject/:0.5 -o merged/ --dtype bfloat16
    """
    from loratool.engine import Engine
    from loratool.ops.merge import plan_merge, run_merge

    plan = plan_merge(
        base,
        adapters,
        output,
        scale=scale,
        dtype=dtype,
        max_shard_size=max_shard_size,
        base_check=base_check,
        link=link,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        overwrite=overwrite,
    )
    engine = Engine(jobs) if jobs else Engine()
    if dry_run:
        _show_plan(out, plan, engine)
        return
    result = run_merge(plan, engine, out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result, output)


def _show_plan(out: Output, plan: MergePlan, engine: Engine) -> None:
    from loratool.provenance import document

    body = plan.to_json(engine.workers)
    if out.as_json:
        out.document(document("merge-plan", 1, body))
        return
    merging = plan.merging
    out.line(
        f"would change {len(merging.placement.updates)} of {len(merging.base.checkpoint)} tensors "
        f"({size_text(merging.changed_bytes)} of {size_text(plan.output_bytes)}) "
        f"on {merging.device}"
    )
    if len(plan.layout.files) > 1:
        out.line(f"files: {len(plan.layout.files)}")
    if out.verbose:
        out.table(
            "updates",
            ["tensor", "update"],
            [[row["name"], row["update"]] for row in body["tensors"]],
            text=2,
        )
    out.line(f"disk: {size_text(plan.written_bytes)}")
    out.line(f"working memory: about {size_text(merging.peak_bytes(engine.workers))}")
    _show_left_out(out, merging.left_out, plan.side_files.skipped)
    out.notes([*merging.notes, *plan.side_files.notes])


def _show_left_out(
    out: Output, updates: tuple[str, ...] | list[str], files: tuple[str, ...] | list[str]
) -> None:
    if updates:
        out.line(f"left out of the adapter as asked: {len(updates)} updates")
    if files:
        out.complain(f"note: other weight files were not carried along: {', '.join(files)}")


def _show(out: Output, report: MergeReport, output: Path) -> None:
    if out.verbose:
        out.table(
            "changed tensors",
            ["tensor", "update", "elements", "changed", "by float64", "by exact sum"],
            [
                [
                    row.name,
                    row.update,
                    f"{row.elements:,}",
                    percent(row.changed / max(row.elements, 1)),
                    f"{row.recomputed:,}",
                    f"{row.exact:,}",
                ]
                for row in report.rows
            ],
            text=2,
        )
    elements, changed = report.total("elements"), report.total("changed")
    out.line(
        f"merged into {output}: {len(report.rows)} of {report.facts['tensors_total']} tensors, "
        f"scale {report.facts['scale']:g}, on {report.facts['device']}"
    )
    out.line(
        f"{changed:,} of {elements:,} weights in them changed "
        f"({percent(changed / max(elements, 1))}); all correctly rounded"
    )
    _show_left_out(out, report.facts["left_out"], report.facts["skipped_files"])
    out.notes(report.facts["notes"])
