"""``loratool inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli import options
from loratool.cli.inspect_adapter import show_adapter
from loratool.cli.inspect_adapters import show_side_by_side
from loratool.cli.inspect_amplification import show_amplification
from loratool.cli.inspect_checkpoint import show_checkpoint
from loratool.cli.inspect_forecast import show_forecast
from loratool.cli.inspect_pair import SORTS, show_pair
from loratool.cli.output import Output
from loratool.cli.pictures import Pictures, picture_options
from loratool.cli.tables import write_csv
from loratool.errors import UsageError

if TYPE_CHECKING:
    from loratool.api import InspectReport

_ROWS = {"checkpoint": "tensors", "adapter": "updates", "pair": "changed"}
"""What is inspected → the field of its document with a row per tensor."""


@click.command("inspect")
@click.argument("paths", metavar="PATH...", type=options.PATH, nargs=-1, required=True)
@click.option(
    "--base",
    type=options.PATH,
    help="For an adapter: the checkpoint it is for, to measure what its updates amplify there, or "
    "at level values what a merge would lose. "
    "For a checkpoint: the one it was tuned from.",
)
@click.option(
    "--level",
    type=click.Choice(["headers", "values", "spectra"]),
    help="headers: no tensor is read; values: one pass; spectra: singular values of changes. "
    "Default: headers of a checkpoint, else spectra.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Only parameters matching this glob ('c_attn', 'h.0', '*.mlp.*'); repeatable.",
)
@click.option(
    "--sort",
    type=click.Choice(list(SORTS)),
    help="Order of a pair's modules, the largest first (default: energy).",
)
@click.option("--exact", is_flag=True, help="Every singular value of a pair's changes.")
@click.option(
    "--csv", "csv_file", type=options.PATH, metavar="FILE", help="Also write a line per tensor."
)
@picture_options
@options.alpha_option
@options.device_option
@options.jobs_option
@options.report_option
@options.framed
def inspect_command(
    out: Output,
    paths: tuple[Path, ...],
    base: Path | None,
    level: str | None,
    only: tuple[str, ...],
    sort: str | None,
    exact: bool,
    csv_file: Path | None,
    pictures: Pictures,
    alpha: float | None,
    device: str,
    jobs: int | None,
    report: Path | None,
) -> None:
    """Look inside a checkpoint or an adapter; at what fine-tuning changed from one checkpoint,
    BASE, to another, TUNED; at several adapters side by side.

    \b
    Example:
      loratool inspect model/ --level values
      loratool inspect adapter/
      loratool inspect adapter/ --base base/
      loratool inspect adapter-a/ adapter-b/ adapter-c/
      loratool inspect base/ tuned/
      loratool inspect base/ tuned/ --html report.html
      loratool inspect tuned/ --base base/ --only '*.mlp.*' --csv changes.csv
    """
    from loratool.api import inspect, inspect_adapters
    from loratool.ops.amplification import AmplificationReport
    from loratool.ops.inspect import (
        AdapterReport,
        AdaptersReport,
        CheckpointReport,
        PairReport,
    )
    from loratool.ops.inspect_forecast import ForecastReport
    from loratool.ops.sources import is_adapter

    pictures.check()
    result: InspectReport | AdaptersReport
    if len(paths) > 2 or (len(paths) == 2 and all(is_adapter(path) for path in paths)):
        if base is not None or exact:
            raise UsageError("adapters side by side take neither --base nor --exact")
        result = inspect_adapters(
            *paths, level=level, only=only, alpha=alpha, jobs=jobs, progress=out.progress()
        )
    else:
        result = inspect(
            *paths,
            base=base,
            level=level,
            only=only,
            exact=exact,
            alpha=alpha,
            device=device,
            jobs=jobs,
            progress=out.progress(),
        )
    if sort is not None and not isinstance(result, PairReport):
        raise UsageError("--sort is for pairs of checkpoints")
    document = result.to_json()
    write_csv(csv_file, _rows(document))
    out.report_file(report, document)
    pictures.write(result)
    if out.as_json:
        out.document(document)
    elif isinstance(result, CheckpointReport):
        show_checkpoint(out, result)
    elif isinstance(result, AdapterReport):
        show_adapter(out, result)
    elif isinstance(result, AdaptersReport):
        show_side_by_side(out, result.adapters)
    elif isinstance(result, AmplificationReport):
        show_amplification(out, result)
    elif isinstance(result, ForecastReport):
        show_forecast(out, result)
    else:
        if base is not None:
            out.line(f"the pair {result.base} and {result.tuned}, as inspect BASE TUNED shows it")
        show_pair(out, result, sort or "energy")
    pictures.show(out)


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per tensor, with what was found in its values where they were read."""
    if document["what"] == "adapters":
        return [
            {"adapter": one["name"]} | row for one in document["adapters"] for row in _rows(one)
        ]
    rows: list[dict[str, Any]] = document.get(_ROWS.get(document["what"], "updates"), [])
    values = {row["name"]: row for row in document.get("values", [])}
    return [row | values.get(row["name"], {}) for row in rows]
