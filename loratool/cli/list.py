"""``loratool list``."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, span
from loratool.cli.tables import write_csv
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.catalogue import CatalogueReport
    from loratool.ops.catalogue_entry import Entry

_MARKS = {"same": "=", "candidate": "?", "near": "~"}
_SORTS = ("name", "kind", "format", "base", "rank", "parameters", "size", "date", "health")
_TARGETS = 4
_NARROW, _WIDE = 84, 130
_COLUMNS = {
    "narrow": ("name", "rank", "size", "health", "alike"),
    "middle": ("name", "format", "rank", "targets", "size", "health", "alike"),
    "wide": (
        *("name", "format", "base or class", "rank", "alpha", "targets"),
        *("parameters", "size", "date", "health", "alike"),
    ),
}
_TEXT = {"name": 1, "format": 2, "base or class": 3}


@click.command("list")
@click.argument("paths", nargs=-1, type=options.PATH)
@click.option(
    "--sort",
    type=click.Choice(_SORTS),
    default="name",
    show_default=True,
    help="Numbers and dates: the largest first.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Only names that a glob covers, whole or a part between slashes; repeatable.",
)
@click.option("--kind", type=click.Choice(["adapter", "checkpoint"]), help="Only these.")
@click.option(
    "--checksum",
    is_flag=True,
    help="Read the files that may be duplicates, to be sure; else only headers are read.",
)
@options.csv_option("entry")
@options.report_option
@options.framed
def list_command(
    out: Output,
    paths: tuple[Path, ...],
    sort: str,
    only: tuple[str, ...],
    kind: str | None,
    checksum: bool,
    csv_file: Path | None,
    report: Path | None,
) -> None:
    """Every adapter and checkpoint below PATH (default: here), whatever its format.

    \b
    Example:
      loratool list
      loratool list models/ more/ --kind adapter --sort date
      loratool list --only '*math*' --checksum --json
    """
    from loratool.api.look import list_models

    found = list_models(
        *paths, only=only, kind=kind, sort=sort, checksum=checksum, progress=out.progress()
    )
    document = found.to_json()
    write_csv(csv_file, document["entries"])
    out.report_file(report, document)
    if out.as_json:
        out.document(document)
        return
    _show(out, found)
    out.notes(found.notes)


def _show(out: Output, found: CatalogueReport) -> None:
    if not found.entries:
        out.line("no adapter or checkpoint found")
        return
    alike = _marks(found)
    width = "narrow" if out.width < _NARROW else "middle" if out.width < _WIDE else "wide"
    columns = [c for c in _COLUMNS[width] if c != "alike" or found.groups]
    if not any(entry.ranks for entry in found.entries):
        columns = [c for c in columns if c not in ("rank", "alpha", "targets")]
    rows = [_row(entry, alike[index], columns) for index, entry in enumerate(found.entries)]
    text = sum(column in _TEXT for column in columns)
    adapters = sum(entry.kind == "adapter" for entry in found.entries)
    checkpoints = len(found.entries) - adapters
    size = size_text(sum(entry.size_bytes for entry in found.entries))
    title = f"{counted(adapters, 'adapter')}, {counted(checkpoints, 'checkpoint')}, {size}"
    out.table(title, columns, rows, text=text)
    ailing = [e for e in found.entries if e.error is not None or not e.read]
    for entry in ailing if out.verbose else []:
        out.line(f"{entry.name}: {entry.error or f'not read: given away by {entry.evidence}'}")
    if ailing and not out.verbose:
        out.line(f"{counted(len(ailing), 'entry', 'entries')} with a problem: -v says which")
    _explain(out, found)


def _explain(out: Output, found: CatalogueReport) -> None:
    from loratool.ops.catalogue_alike import CRITERIA

    for likeness in dict.fromkeys(group.likeness for group in found.groups):
        more = "" if likeness != "candidate" else "; --checksum reads them and tells"
        out.line(f"{_MARKS[likeness]}: {CRITERIA[likeness]}{more}")


def _marks(found: CatalogueReport) -> dict[int, str]:
    """Entry → its groups, such as ``=1 ~2``, numbered within each likeness."""
    marks: dict[int, list[str]] = defaultdict(list)
    count: dict[str, int] = defaultdict(int)
    for group in found.groups:
        count[group.likeness] += 1
        for index in group.members:
            marks[index].append(f"{_MARKS[group.likeness]}{count[group.likeness]}")
    return defaultdict(str, {index: " ".join(each) for index, each in marks.items()})


def _row(entry: Entry, alike: str, columns: list[str]) -> list[str]:
    cells = {
        "name": entry.name,
        "format": entry.format if entry.read else f"unread: {entry.format}",
        "base or class": entry.base or entry.architecture or "",
        "rank": span(entry.ranks),
        "alpha": span(entry.alphas),
        "targets": _targets(entry),
        "parameters": "" if entry.parameters is None else _short(entry.parameters),
        "size": size_text(entry.size_bytes),
        "date": datetime.fromtimestamp(entry.modified, UTC).strftime("%Y-%m-%d"),
        "health": entry.health,
        "alike": alike,
    }
    return [cells[column] for column in columns]


def _targets(entry: Entry) -> str:
    names = [name.removesuffix("_proj") for name in entry.targets]
    more = f" +{len(names) - _TARGETS}" if len(names) > _TARGETS else ""
    return ",".join(names[:_TARGETS]) + more


def _short(count: int) -> str:
    """12345678 → '12.3 M'."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
