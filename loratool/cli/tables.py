"""Rows of a report: sorted as asked, and as a file of comma-separated values."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import OutputError

Row = TypeVar("Row")
Sorts = Mapping[str, Callable[[Row], Any] | None]
"""--sort: what can be asked for, the default first → key of a line; None: as they are. Every table
has ``name``, which decides between equals."""


def in_order(lines: Sequence[Row], sort: str | None, sorts: Sorts[Row]) -> list[Row]:
    """The lines of a table as --sort asks for it, by the first of ``sorts`` where it does not."""
    key, name = sorts[sort or next(iter(sorts))], sorts["name"]
    if key is None:
        return list(lines)
    assert name is not None
    return sorted(lines, key=lambda line: (key(line), name(line)))


def write_csv(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, its fields those of the JSON document; lists and maps as JSON, and a
    quote before text that a spreadsheet would take for a formula.

    Raises OutputError.
    """
    if path is None:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula; names come from files of strangers."""


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULAS):
        return f"'{value}"
    return json.dumps(value) if isinstance(value, list | dict | tuple) else value
