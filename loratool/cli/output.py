"""What commands print: results on stdout, everything else on stderr, or one JSON document."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loratool.cli.narrow import NAME, fits, paragraphs
from loratool.errors import LoratoolError, OutputError
from loratool.provenance import document

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

_PIPE_WIDTH = 120
_LONGEST_WIDTH = 4
"""Digits of a width that are read."""
_PADDING = 3
_QUIET_SECONDS = 0.7
_MANY_ALIKE = 4
"""So many notes that differ in names alone become one."""


def printable(text: str) -> str:
    """``text`` with every character that could steer a terminal shown as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _alike(notes: Sequence[str]) -> list[list[str]]:
    """Notes that differ in at most a third of their words, together, in the order of the first."""
    groups: list[list[str]] = []
    for note in notes:
        words = note.split()
        for group in groups:
            first = group[0].split()
            if len(first) == len(words):
                different = sum(one != two for one, two in zip(first, words, strict=True))
                if 3 * different <= len(words):
                    group.append(note)
                    break
        else:
            groups.append([note])
    return groups


class Output:
    """One command's output, in the form the user asked for."""

    def __init__(self, command: str, *, as_json: bool, quiet: bool, verbose: bool, debug: bool):
        self.command = command
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self.debug = debug

    def document(self, body: dict[str, Any]) -> None:
        """The result as JSON, the only thing on stdout."""
        print(json.dumps(body))

    def line(self, text: str = "") -> None:
        """A line of the result."""
        if not self.as_json and not self.quiet:
            _console(sys.stdout).print(
                printable(text), markup=False, highlight=False, soft_wrap=True
            )

    @property
    def width(self) -> int:
        """Columns that a line of the result has."""
        return _console(sys.stdout).width

    @property
    def has_colour(self) -> bool:
        """Whether the result may be coloured: a terminal that can, in shades of a colour, which 16
        colours are too few for, and no NO_COLOR."""
        console = _console(sys.stdout)
        shaded = console.color_system in ("256", "truecolor")
        return console.is_terminal and shaded and not console.no_color

    @property
    def has_unicode(self) -> bool:
        """Whether block characters can be shown."""
        encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
        return encoding.startswith("utf")

    def coloured(self, parts: Sequence[tuple[str, str | None]]) -> None:
        """A line of the result in parts, each with a style or None."""
        if self.as_json or self.quiet:
            return
        from rich.text import Text

        line = Text(no_wrap=True)
        for text, style in parts:
            line.append(printable(text), style=style or "")
        _console(sys.stdout).print(line, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1
    ) -> None:
        """A table of the result; the first ``text`` columns are names, the others numbers.

        Where the terminal is too narrow for it, a paragraph for each row.
        """
        if self.as_json or self.quiet:
            return
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        console = _console(sys.stdout)
        rows = [[printable(cell) for cell in row] for row in rows]
        if not fits(console.width, columns, rows, text):
            console.print(Text(printable(title)), "", sep="\n")
            for line in paragraphs(console.width, columns, rows, text):
                console.print(Text(line, overflow="fold"))
            console.print()
            return
        table = Table(box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            is_text = index < text
            table.add_column(
                Text(column),
                justify="left" if is_text else "right",
                overflow="fold",
                no_wrap=not is_text,
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        with console.capture() as printed:
            console.print(Text(printable(title), style="table.title"), soft_wrap=True)
            console.print(table)
        lines = printed.get().rstrip("\n").split("\n")
        print("\n".join(line.rstrip(" ") for line in lines), file=console.file)

    def notes(self, notes: Sequence[str]) -> None:
        """Things the user should know, on stderr; in JSON they are part of the document.

        Many that say the same of different names are one line, unless all are asked for.
        """
        if self.as_json or self.quiet:
            return
        for alike in _alike(notes):
            if self.verbose or len(alike) < _MANY_ALIKE:
                for note in alike:
                    self.complain(f"note: {note}")
            else:
                self.complain(f"note: {alike[0]} ({len(alike) - 1} more like this; -v shows all)")

    def complain(self, text: str) -> None:
        """A line on stderr."""
        _console(sys.stderr).print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def failure(self, error: LoratoolError, code: int) -> None:
        """An error, in words or as the one JSON document."""
        if self.as_json:
            self.document(error_document(self.command, type(error).__name__, error, code))
            return
        self.complain(f"error: {error.message}")
        for detail in error.details:
            self.complain(f"  {detail}")
        if error.hint:
            self.complain(f"  {error.hint}")

    def progress(self) -> TerminalProgress:
        """A progress bar on stderr, or nothing where nobody watches."""
        shown = not (self.as_json or self.quiet) and sys.stderr.isatty()
        return TerminalProgress(shown)

    def report_file(self, path: Path | None, body: dict[str, Any]) -> None:
        """Write the report where --report asks for it. Raises OutputError."""
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(body, indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def error_document(command: str, kind: str, error: LoratoolError, code: int) -> dict[str, Any]:
    """An error as JSON."""
    body = {
        "kind": kind,
        "message": error.message,
        "details": list(error.details),
        "hint": error.hint,
        "exit_code": code,
    }
    return document("error", 1, {"error": body}) | {"command": command}


class TerminalProgress:
    """A bar that appears only when the work lasts long enough to wonder about."""

    def __init__(self, shown: bool):
        self._shown = shown
        self._bar: RichProgress | None = None
        self._lock = threading.Lock()
        self._begin = 0.0
        self._done = 0
        self._total = 0
        self._what = ""

    def start(self, what: str, total: int) -> None:
        self._begin, self._done, self._total, self._what = time.monotonic(), 0, total, what

    def advance(self, amount: int) -> None:
        if not self._shown:
            return
        with self._lock:
            self._done += amount
            if self._bar is None and time.monotonic() - self._begin > _QUIET_SECONDS:
                self._open()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)

    def finish(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _open(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=_console(sys.stderr),
            transient=True,
        )
        self._bar.add_task(self._what, total=self._total)
        self._bar.start()


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=stream, width=_width(stream), soft_wrap=False, emoji=False)


def _width(stream: IO[str]) -> int:
    """What COLUMNS says where it is a number, else what the terminal has. rich takes a COLUMNS of
    0 at its word, and then prints nothing.
    """
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said[:_LONGEST_WIDTH]) > 0:
        return int(said[:_LONGEST_WIDTH])
    try:
        return os.get_terminal_size(stream.fileno()).columns or _PIPE_WIDTH
    except (OSError, ValueError):  # a pipe, a file, or no file at all
        return _PIPE_WIDTH


def fitting(
    width: int,
    lines: Sequence[Mapping[str, str]],
    order: Sequence[str],
    always: Sequence[str],
    by_worth: Sequence[str],
) -> list[str]:
    """The columns that a table of ``lines`` has room for, in ``order``: those of ``always``, and
    of ``by_worth``, most first, what fits beside them and is not empty throughout. The first of
    ``order`` holds names, which may be folded: however long, they leave half of the width.
    """
    there = {column for line in lines for column, cell in line.items() if cell}

    def needed(column: str) -> int:
        return max([len(column), *(len(line.get(column, "")) for line in lines)]) + _PADDING

    room = width - 1 - sum(needed(column) for column in always)
    room += max(0, needed(order[0]) - max(width // 2, NAME + _PADDING))
    chosen = set(always)
    for column in by_worth:
        if column in there and needed(column) <= room:
            room -= needed(column)
            chosen.add(column)
    return [column for column in order if column in chosen]


_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-:=+*#"


def spark(values: Sequence[float], top: float | None = None) -> str:
    """One character per value, its height the value's share of ``top`` (default: the largest)."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    bars = _BARS if encoding.startswith("utf") else _ASCII_BARS
    peak = top if top is not None else max(values, default=0.0)
    if peak <= 0:
        return bars[0] * len(values)
    return "".join(bars[min(7, int(8 * max(value, 0.0) / peak))] for value in values)


def span(values: Sequence[float]) -> str:
    """[8, 8] → '8'; [4, 8] → '4–8'; nothing of nothing."""
    if not values:
        return ""
    low, high = (f"{end:.3g}" for end in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"
