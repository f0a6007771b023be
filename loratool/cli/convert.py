"""``loratool convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.layouts.families import natural
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.convert import ConvertPlan, ConvertReport


@click.command("convert")
@click.argument("adapter", type=options.PATH)
@options.output_option
@options.alpha_option
@click.option(
    "--fused-parts",
    metavar="q,k,v",
    help="Which of q, k and v the fused modules of a loralib file adapt; 'q,v' in the paper's.",
)
@click.option(
    "--start",
    type=options.PATH,
    metavar="ADAPTER",
    help="What training began with, where the base was changed for it (PiSSA, OLoRA …): the "
    "result, of twice the rank, is for the original base.",
)
@click.option("--base-model", metavar="OWNER/NAME", help="The base's name on the Hub.")
@options.format_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def convert_command(
    out: Output,
    adapter: Path,
    output: Path,
    alpha: float | None,
    fused_parts: str | None,
    start: Path | None,
    base_model: str | None,
    format_name: str,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Write ADAPTER, of any format that loratool reads, in another format.

    \b
    Example:
      loratool convert roberta_base_lora_mnli.bin -o mnli/ --alpha 16
      loratool convert trained/ -o plain/ --start start/
    """
    from loratool.ops.convert import plan_convert, run_convert

    plan = plan_convert(
        adapter,
        output,
        alpha=alpha,
        fused_parts=fused_parts,
        start=start,
        base_model=base_model,
        format=format_name,
        overwrite=overwrite,
    )
    if dry_run:
        _show_plan(out, plan)
        return
    result = run_convert(plan)
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result, output)


def _show_plan(out: Output, plan: ConvertPlan) -> None:
    from loratool.provenance import document

    body = plan.to_json()
    if out.as_json:
        out.document(document("convert-plan", 1, body))
        return
    out.line(
        f"would write {counted(len(body['updates']), 'update')} from {body['from']} as "
        f"{body['to']}, about {size_text(plan.adapter_bytes)}"
    )


def _show(out: Output, report: ConvertReport, output: Path) -> None:
    if out.verbose:
        updates = sorted(map(list, report.updates), key=lambda row: natural(row[0]))
        out.table("updates", ["parameter", "update"], updates, text=2)
    without = f", without its start {report.facts['start']}" if report.facts["start"] else ""
    out.line(
        f"converted to {output}: {counted(len(report.updates), 'update')} from "
        f"{report.facts['from']} as {report.facts['to']}{without}; "
        f"{counted(report.parameters, 'parameter')}, {size_text(report.nbytes)}"
    )
    if report.facts["base_model"] is None and report.facts["to"] == "PEFT":
        out.line("it names no base; --base-model OWNER/NAME does")
    out.notes(report.notes)
