"""``loratool inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options
from loratool.cli.inspect_adapter import show_adapter
from loratool.cli.inspect_amplification import show_amplification
from loratool.cli.inspect_checkpoint import show_checkpoint
from loratool.cli.inspect_pair import show_pair
from loratool.cli.output import Output


@click.command("inspect")
@click.argument("path", type=options.PATH)
@click.argument("tuned", type=options.PATH, required=False)
@click.option(
    "--base",
    type=options.PATH,
    help="For an adapter: the checkpoint it is for, to measure what its updates amplify there.",
)
@options.alpha_option
@options.device_option
@options.jobs_option
@options.report_option
@options.framed
def inspect_command(
    out: Output,
    path: Path,
    tuned: Path | None,
    base: Path | None,
    alpha: float | None,
    device: str,
    jobs: int | None,
    report: Path | None,
) -> None:
    """Look inside PATH, a checkpoint or an adapter; with TUNED, at what fine-tuning changed.

    \b
    Example:
      loratool inspect model/
      loratool inspect adapter/
      loratool inspect adapter/ --base base/
      loratool inspect base/ tuned/
    """
    from loratool.api import inspect
    from loratool.ops.amplification import AmplificationReport
    from loratool.ops.inspect import AdapterReport, CheckpointReport

    result = inspect(
        path, tuned, base=base, alpha=alpha, device=device, jobs=jobs, progress=out.progress()
    )
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    elif isinstance(result, CheckpointReport):
        show_checkpoint(out, result)
    elif isinstance(result, AdapterReport):
        show_adapter(out, result)
    elif isinstance(result, AmplificationReport):
        show_amplification(out, result)
    else:
        show_pair(out, result)
