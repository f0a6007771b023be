"""``loratool inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli import (
    inspect_adapter,
    inspect_adapters,
    inspect_amplification,
    inspect_checkpoint,
    inspect_forecast,
    inspect_intruders,
    inspect_pair,
    options,
)
from loratool.cli.inspect_intruders import Looking, Writing, look_for_intruders
from loratool.cli.output import Output
from loratool.cli.pictures import Pictures, picture_options
from loratool.cli.tables import write_csv
from loratool.errors import UsageError
from loratool.layouts.families import natural

if TYPE_CHECKING:
    from loratool.api.look import InspectReport
    from loratool.ops.inspect import AdaptersReport
    from loratool.ops.intruders import IntruderReport

    Report = InspectReport | AdaptersReport | IntruderReport

_ADAPTER = ("updates", "replaced", "others")
_ROWS = {
    ("checkpoint", "headers"): ("tensors",),
    ("checkpoint", "values"): ("tensors",),
    ("checkpoint", "spectra"): ("weights",),
    ("adapter", "headers"): _ADAPTER,
    ("adapter", "values"): ("values",),
    ("adapter", "spectra"): _ADAPTER,
    ("pair", "headers"): ("tensors",),
    ("pair", "values"): ("changed",),
    ("pair", "spectra"): ("changed",),
    ("amplification", None): ("updates",),
    ("forecast", "values"): ("updates",),
    ("intruders", "spectra"): ("weights",),
}
"""What is inspected, level in its document → the fields of that with a row per tensor."""

_VIEWS: dict[str, Callable[[Output, Any, str | None], None]] = {
    "checkpoint": inspect_checkpoint.show_checkpoint,
    "adapter": inspect_adapter.show_adapter,
    "adapters": inspect_adapters.show_side_by_side,
    "amplification": inspect_amplification.show_amplification,
    "forecast": inspect_forecast.show_forecast,
    "intruders": inspect_intruders.show_intruders,
    "pair": inspect_pair.show_pair,
}
_SORTS: dict[str, Iterable[str]] = {
    "checkpoint": inspect_checkpoint.SORTS,
    "adapter": inspect_adapter.SORTS,
    "adapters": inspect_adapters.SORTS,
    "amplification": inspect_amplification.SORTS,
    "forecast": inspect_forecast.SORTS,
    "intruders": inspect_intruders.SORTS,
    "pair": inspect_pair.SORTS,
}
"""What is inspected → how it is shown, and what --sort takes there, the default first."""


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
    help="headers: no tensor is read; values: one pass; spectra: singular values. "
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
    type=click.Choice(sorted({name for sorts in _SORTS.values() for name in sorts})),
    help="Order of the table, the largest first; each view has its own (default of a pair: "
    "energy).",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Every singular value, of a pair's changes or a checkpoint's weights.",
)
@options.csv_option("tensor")
@picture_options
@click.option(
    "--cost",
    metavar="RANK[,RANK...]",
    help="Of a checkpoint: what adapters of these ranks take to keep, merge and extract.",
)
@click.option(
    "--amplification",
    is_flag=True,
    help="Of a pair: what the change amplifies in the base, as of an adapter with --base.",
)
@click.option(
    "--intruders",
    is_flag=True,
    help="Of a pair, or an adapter with --base: strong directions of the tuned weights that the "
    "base does not have.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="K",
    help="Leading directions of each weight to examine for intruders (default: 10).",
)
@click.option(
    "--epsilon",
    type=options.FINITE,
    metavar="E",
    help="An intruder's cosines to all directions of the base are below this (default: 0.5).",
)
@click.option(
    "--mitigate",
    type=options.FINITE,
    metavar="FACTOR",
    help="Write what was tuned to -o with its intruders at FACTOR times their size.",
)
@click.option("-o", "--output", type=options.PATH, help="Where --mitigate writes.")
@options.alpha_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
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
    cost: str | None,
    amplification: bool,
    intruders: bool,
    top: int | None,
    epsilon: float | None,
    mitigate: float | None,
    output: Path | None,
    alpha: float | None,
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
) -> None:
    """Look inside a checkpoint or an adapter; at what fine-tuning changed from one checkpoint,
    BASE, to another, TUNED; at several adapters side by side.

    \b
    Example:
      loratool inspect model/ --level values
      loratool inspect model/ --cost 8,16,64
      loratool inspect adapter/
      loratool inspect adapter/ --base base/
      loratool inspect adapter-a/ adapter-b/ adapter-c/
      loratool inspect base/ tuned/
      loratool inspect base/ tuned/ --html report.html
      loratool inspect tuned/ --base base/ --only '*.mlp.*' --csv changes.csv
      loratool inspect base/ tuned/ --intruders
      loratool inspect adapter/ --base base/ --mitigate 0.75 -o milder/
    """
    if intruders or mitigate is not None:
        if cost is not None or amplification:
            raise UsageError("--intruders goes with neither --cost nor --amplification")
        view = Looking(top, epsilon, exact, only, alpha, device, jobs, level)
        overwrites = pictures.overwrite and (mitigate is not None or not pictures.asked)
        writing = Writing(mitigate, output, dry_run=dry_run, overwrite=overwrites)
        if dry_run:
            pictures.refuse("a plan")
        pictures.check()
        found = look_for_intruders(out, paths, base, view, writing)
        if found is not None:
            _say(out, found, sort, csv_file, report, pictures)
        return
    _refuse_alone(
        {
            "--top": top is not None,
            "--epsilon": epsilon is not None,
            "-o": output is not None,
            "--dry-run": dry_run,
        }
    )
    from loratool.api.look import inspect, inspect_adapters
    from loratool.ops.inspect_cost import parse_ranks
    from loratool.ops.sources import is_adapter

    pictures.check()
    result: Report
    if len(paths) > 2 or (len(paths) == 2 and all(is_adapter(path) for path in paths)):
        if base is not None or exact or amplification or cost is not None:
            raise UsageError(
                "adapters side by side take none of --base, --exact, --amplification, --cost"
            )
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
            amplification=amplification,
            cost=parse_ranks(cost) if cost is not None else (),
            alpha=alpha,
            device=device,
            jobs=jobs,
            progress=out.progress(),
        )
    from loratool.ops.inspect import PairReport

    if base is not None and isinstance(result, PairReport):
        out.line(f"the pair {result.base} and {result.tuned}, as inspect BASE TUNED shows it")
    _say(out, result, sort, csv_file, report, pictures)


def _say(
    out: Output,
    result: Report,
    sort: str | None,
    csv_file: Path | None,
    report: Path | None,
    pictures: Pictures,
) -> None:
    """The result in every form that was asked for."""
    document = result.to_json()
    check_sort(sort, document["what"])
    pictures.write(result)
    write_csv(csv_file, _rows(document))
    out.report_file(report, document)
    if out.as_json:
        out.document(document)
    else:
        _VIEWS[document["what"]](out, result, sort)
    pictures.show(out)


def check_sort(sort: str | None, what: str) -> None:
    """Raises UsageError for an order that the view does not have."""
    if sort is not None and sort not in _SORTS[what]:
        raise UsageError(f"--sort {sort}: this view is sorted by {', '.join(_SORTS[what])}")


def _refuse_alone(given: dict[str, bool]) -> None:
    clashing = [name for name, is_given in given.items() if is_given]
    if clashing:
        raise UsageError(
            f"{', '.join(clashing)}: goes with --intruders or --mitigate",
            hint="inspect writes nothing else than reports",
        )


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per tensor by name, with what was found in its values where they were read."""
    if document["what"] == "adapters":
        return [
            {"adapter": one["name"]} | row for one in document["adapters"] for row in _rows(one)
        ]
    fields = _ROWS[document["what"], document.get("level")]
    rows = [row for field in fields for row in document[field]]
    if "changed" in fields:
        still = dict.fromkeys(rows[0] if rows else ["name"]) | {
            "delta_norm": 0.0,
            "changed_share": 0.0,
        }
        rows += [{**still, "name": name} for name in document["unchanged"]]
    rows.sort(key=lambda row: natural(row["name"]))
    values = {row["name"]: row for row in document.get("values", [])}
    return [row | values.get(row["name"], {}) for row in rows]
