"""``loratool recover``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.errors import UsageError
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.recover import RecoverReport


@click.command("recover")
@click.argument("path", type=options.PATH)
@click.option("--forward", is_flag=True, help="Finish the merge that was begun.")
@click.option("--back", is_flag=True, help="Put every byte back as it was.")
@options.jobs_option
@options.dry_run_option
@options.framed
def recover_command(
    out: Output, path: Path, forward: bool, back: bool, jobs: int | None, dry_run: bool
) -> None:
    """Finish or undo a merge --in-place that was interrupted.

    PATH is the checkpoint. Without --forward or --back it says what was done so far, and exits
    with 1 if there is something to recover.

    \b
    Example:
      loratool recover base/
      loratool recover base/ --back
    """
    from loratool.engine import Engine
    from loratool.ops.recover import look, recover_back, recover_forward

    if forward and back:
        raise UsageError("--forward and --back are two ways out; choose one")
    direction = "forward" if forward else "back" if back else None
    if direction is None or dry_run:
        report = look(path)
    elif direction == "back":
        report = recover_back(path, out.progress())
    else:
        report = recover_forward(path, Engine(jobs) if jobs else Engine(), out.progress())
    if out.as_json:
        out.document(report.to_json())
    else:
        _show(out, report, path, direction)
    if report.found and direction is None:
        sys.exit(1)


def _show(out: Output, report: RecoverReport, path: Path, direction: str | None) -> None:
    if not report.found:
        out.line(f"{path}: nothing to recover")
        return
    adapters = " ".join(f"{name}:{weight:g}" for name, weight in report.adapters)
    out.line(f"{path}: {report.command} of {adapters} was interrupted")
    between = f", {report.blocks_between} in between" if report.blocks_between else ""
    out.line(
        f"{report.blocks_changed} of {report.blocks} blocks were changed{between} "
        f"({size_text(report.bytes)} in all)"
    )
    if report.action == "back":
        out.line("everything is as it was before the merge")
    elif report.action == "forward":
        out.line("the merge is finished")
    elif direction == "back":
        out.line("would put every changed block back")
    elif direction == "forward":
        out.line("would change the other blocks")
    else:
        out.line("--forward finishes the merge, --back puts everything back")
