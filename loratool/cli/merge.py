"""``loratool merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from loratool.cli import options
from loratool.cli.merge_output import (
    receipt_size,
    show,
    show_changes,
    show_receipt,
    show_rest,
    shown_as_json,
)
from loratool.cli.output import Output
from loratool.errors import UsageError
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.engine import Engine
    from loratool.layouts.placing import TieChoice
    from loratool.ops.merge_jobs import Asked
    from loratool.ops.merge_report import MergeReport


class _MergeCommand(click.Command):
    """Understands ``--receipt=FILE`` beside the plain flag ``--receipt``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = "--receipt="
        return super().parse_args(
            ctx,
            [
                f"--receipt-file={word.removeprefix(named)}" if word.startswith(named) else word
                for word in args
            ],
        )


@click.command("merge", cls=_MergeCommand)
@click.argument("base", type=options.PATH)
@click.argument(
    "adapters", type=options.WEIGHTED, nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]..."
)
@click.option("-o", "--output", type=options.PATH, help="Where the result goes.")
@click.option(
    "--in-place",
    is_flag=True,
    help="Change the base's own files, under a journal (see recover), instead of -o.",
)
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
    "--lost",
    is_flag=True,
    help="Measure the share of the update that rounding swallows; takes a second pass.",
)
@click.option(
    "--allow-overflow",
    is_flag=True,
    help="Let values beyond the dtype's range become infinite, and count them.",
)
@click.option(
    "--allow-lossy",
    is_flag=True,
    help="Merge into 8-bit weights that have no scales, for most updates too coarse.",
)
@click.option(
    "--tied",
    "ties",
    flag_value="both",
    help="Where embedding and head are one matrix: an update of one changes both.",
)
@click.option(
    "--untie",
    "ties",
    flag_value="apart",
    help="Store embedding and head apart from now on; config.json says so.",
)
@click.option(
    "--add-bias",
    is_flag=True,
    help="Add the biases that an adapter trained for modules without one (lora_bias).",
)
@click.option(
    "--link",
    is_flag=True,
    help="Hard links to the base's files, instead of copies, for those that stay as they are.",
)
@click.option(
    "--receipt",
    is_flag=True,
    help="Leave loratool_receipt.safetensors, with which unmerge restores the base bit for bit; "
    "--receipt=FILE puts it elsewhere.",
)
@click.option("--receipt-file", type=options.PATH, hidden=True)
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
    output: Path | None,
    in_place: bool,
    scale: float,
    dtype: str | None,
    max_shard_size: str | None,
    base_check: bool,
    lost: bool,
    allow_overflow: bool,
    allow_lossy: bool,
    ties: str | None,
    add_bias: bool,
    link: bool,
    receipt: bool,
    receipt_file: Path | None,
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
      loratool merge my-model/ adapter/ --in-place
    """
    from loratool.engine import Engine
    from loratool.layouts.placing import TieChoice
    from loratool.ops.merge_jobs import Asked

    engine = Engine(jobs) if jobs else Engine()
    asked = Asked(lost, allow_overflow)
    values = Values(scale, alpha, device, include, exclude, base_check, asked, allow_lossy)
    if in_place:
        _refuse_with_in_place(
            {
                "-o": output,
                "--dtype": dtype,
                "--max-shard-size": max_shard_size,
                "--untie": ties == "apart",
                "--add-bias": add_bias,
                "--link": link,
                "--receipt": receipt_file or receipt,
                "--overwrite": overwrite,
            }
        )
        choice = TieChoice(ties or TieChoice.REFUSE)
        result = _merge_in_place(out, base, adapters, values, choice, engine, dry_run)
    elif output is None:
        raise UsageError("no output is named", hint="name it after -o, or merge --in-place")
    else:
        choice = TieChoice(ties or TieChoice.REFUSE)
        form = Form(
            dtype, max_shard_size, choice, add_bias, link, receipt_file or receipt, overwrite
        )
        result = _merge_into(out, base, adapters, output, values, form, engine, dry_run)
    if result is None:
        return
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        show(out, result, output or base)
        if not in_place:
            show_receipt(out, result)


class Values(NamedTuple):
    """Options that decide the merged values."""

    scale: float
    alpha: float | None
    device: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    base_check: bool
    asked: Asked
    allow_lossy: bool


class Form(NamedTuple):
    """Options that decide the form of the output."""

    dtype: str | None
    max_shard_size: str | None
    ties: TieChoice
    add_bias: bool
    link: bool
    receipt: bool | Path
    overwrite: bool


def _merge_into(
    out: Output,
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    output: Path,
    values: Values,
    form: Form,
    engine: Engine,
    dry_run: bool,
) -> MergeReport | None:
    from loratool.ops.merge import plan_merge, run_merge

    plan = plan_merge(base, adapters, output, **values._asdict(), **form._asdict())
    if not dry_run:
        return run_merge(plan, engine, out.progress())
    body = plan.to_json(engine.workers)
    if shown_as_json(out, body):
        return None
    show_changes(out, plan.merging, body, plan.output_bytes)
    if len(plan.layout.files) > 1:
        out.line(f"files: {len(plan.layout.files)}")
    out.line(f"disk: {size_text(plan.written_bytes)}")
    if plan.receipt is not None:
        merging = plan.merging
        size = receipt_size(merging.changed_weights, len(merging.base.checkpoint))
        out.line(f"receipt: {plan.receipt}, {size}")
    show_rest(out, plan.merging, body, plan.side_files.skipped, plan.side_files.notes)
    return None


def _merge_in_place(
    out: Output,
    base: Path,
    adapters: tuple[tuple[Path, float], ...],
    values: Values,
    ties: TieChoice,
    engine: Engine,
    dry_run: bool,
) -> MergeReport | None:
    from loratool.ops.merge_in_place import plan_in_place, run_in_place

    plan = plan_in_place(base, adapters, ties=ties, **values._asdict())
    if not dry_run:
        return run_in_place(plan, engine, out.progress())
    body = plan.to_json(engine.workers)
    if shown_as_json(out, body):
        return None
    show_changes(out, plan.merging, body, plan.merging.base.checkpoint.size_bytes)
    out.line(
        f"disk, until it has finished: {size_text(body['disk_at_least'])} and the journal, "
        f"together at most {size_text(body['disk_at_most'])}"
    )
    show_rest(out, plan.merging, body, (), ())
    return None


def _refuse_with_in_place(given: dict[str, object]) -> None:
    clashing = [name for name, value in given.items() if value]
    if clashing:
        raise UsageError(
            f"--in-place does not go with {', '.join(clashing)}",
            hint="in place, the files keep their names, dtypes and sizes: no tensor has room to be "
            "added, and no receipt has both sides to compare; merge into a new folder with -o",
        )
