"""``loratool resize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.cli.updates import show_updates
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.resize import ResizePlan


@click.command("resize")
@click.argument("adapter", type=options.PATH)
@options.output_option
@click.option(
    "--rank",
    required=True,
    metavar="N|RULE",
    help="Components to keep: a number, a rule such as energy:0.95 or error:0.01 (see "
    "docs/ranks.md), or a budget for all together such as budget:20MB or budget:50%.",
)
@click.option("--min-rank", type=click.IntRange(min=1), default=1, help="At least this rank.")
@click.option("--max-rank", type=click.IntRange(min=1), help="At most this rank.")
@click.option(
    "--multiple-of", type=click.IntRange(min=1), default=1, help="Round ranks up to a multiple."
)
@click.option(
    "--uniform",
    is_flag=True,
    help="One rank and one scale for all updates, as servers want it: the others are padded.",
)
@click.option(
    "--balance",
    is_flag=True,
    help="New factors of equal size, B·√Σ and √Σ·A, also where the rank stays.",
)
@click.option(
    "--profile",
    default="peft",
    show_default=True,
    metavar="peft|vllm|sglang|llama.cpp",
    help="Guarantee what this consumer takes, or say what is in the way.",
)
@options.format_option
@click.option("--dtype", help="Dtype of the factors [default: the adapter's].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of added rows of A.")
@options.alpha_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def resize_command(
    out: Output,
    adapter: Path,
    output: Path,
    rank: str,
    min_rank: int,
    max_rank: int | None,
    multiple_of: int,
    uniform: bool,
    balance: bool,
    profile: str,
    format_name: str,
    dtype: str | None,
    seed: int,
    alpha: float | None,
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Change an adapter's rank: the best approximation of each update, or padding with zeros.

    A larger rank gets zero columns in B and random rows in A, which change nothing until they are
    trained. Factors that lose nothing stay as they are, to the bit.

    \b
    Example:
      loratool resize adapter/ -o small/ --rank energy:0.95
      loratool resize adapter/ -o served/ --rank error:0.02 --profile vllm
    """
    from loratool.algebra.ranks import RankLimits
    from loratool.engine import Engine
    from loratool.ops.resize import plan_resize, run_resize

    plan = plan_resize(
        adapter,
        output,
        rank=rank,
        limits=RankLimits(min_rank, max_rank, multiple_of),
        uniform=uniform,
        balance=balance,
        profile=profile,
        format=format_name,
        dtype=dtype,
        device=device,
        seed=seed,
        alpha=alpha,
        overwrite=overwrite,
    )
    if dry_run:
        _show_plan(out, plan)
        return
    result = run_resize(plan, Engine(jobs) if jobs else Engine(), out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
        return
    show_updates(out, result, f"{output}: rank {plan.rank}", output)


def _show_plan(out: Output, plan: ResizePlan) -> None:
    from loratool.provenance import document

    if out.as_json:
        out.document(document("resize-plan", 1, plan.to_json()))
        return
    out.line(
        f"would resize {counted(len(plan.jobs), 'update')} to rank {plan.rank} in {plan.dtype.name}"
    )
    out.line(f"reads {size_text(plan.read_bytes)}")
    out.line(f"adapter: at most {size_text(plan.adapter_bytes_at_most)} of updates")
    out.notes(plan.notes)
