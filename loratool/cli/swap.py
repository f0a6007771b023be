"""``loratool swap``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.plural import counted
from loratool.report.text import size_text


@click.command("swap")
@click.argument("merged", type=options.PATH)
@click.option(
    "--remove",
    type=options.WEIGHTED,
    multiple=True,
    required=True,
    metavar="ADAPTER[:WEIGHT]",
    help="What was merged, with its weight; repeatable.",
)
@click.option(
    "--add",
    type=options.WEIGHTED,
    multiple=True,
    required=True,
    metavar="ADAPTER[:WEIGHT]",
    help="What is to be merged instead; repeatable.",
)
@options.output_option
@options.receipt_option
@options.alpha_option
@options.include_option
@options.exclude_option
@click.option(
    "--tied",
    is_flag=True,
    help="Where embedding and head are one matrix: an added update of one changes both.",
)
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def swap_command(
    out: Output,
    merged: Path,
    remove: tuple[tuple[Path, float], ...],
    add: tuple[tuple[Path, float], ...],
    output: Path,
    receipt: Path | None,
    alpha: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    tied: bool,
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Take adapters out of MERGED and merge others instead, in one pass.

    Exact through the receipt that merge --receipt left: the result is what unmerge and then merge
    --receipt would give, byte for byte, and has a receipt of its own. --include and
    --exclude choose among what is added.

    \b
    Example:
      loratool swap merged/ --remove old/ --add new/:0.8 -o swapped/
    """
    from loratool.engine import Engine
    from loratool.ops.swap import plan_swap, run_swap
    from loratool.provenance import document

    plan = plan_swap(
        merged,
        remove,
        add,
        output,
        receipt=receipt,
        alpha=alpha,
        device=device,
        include=include,
        exclude=exclude,
        tied=tied,
        overwrite=overwrite,
    )
    if dry_run:
        if out.as_json:
            out.document(document("swap-plan", 1, plan.to_json()))
            return
        out.line(
            f"would restore {counted(len(plan.unmerge.updates), 'tensor')} and change "
            f"{len(plan.merging.placement.updates)} ({size_text(plan.unmerge.output_bytes)}) on "
            f"{plan.merging.device}"
        )
        out.notes(plan.notes)
        return
    result = run_swap(plan, Engine(jobs) if jobs else Engine(), out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
        return
    facts = result.facts
    out.line(
        f"swapped into {output}: {facts['restored']} of "
        f"{counted(facts['tensors_total'], 'tensor')} restored, {len(result.merged.rows)} changed, "
        f"on {facts['device']}"
    )
    out.line(
        f"receipt: {facts['receipt']['name']}, {size_text(facts['receipt']['bytes'])}, "
        f"{facts['receipt']['bits_per_weight']:.2f} bit per changed weight"
    )
    out.notes(facts["notes"])
