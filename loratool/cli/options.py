"""Options that several commands share, and the frame every command runs in."""

from __future__ import annotations

import functools
import gc
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from loratool.cli.errors import BUG, INTERRUPTED, exit_code
from loratool.cli.output import Output
from loratool.errors import LoratoolError, OutputError
from loratool.storage.disk import refusal

Command = Callable[..., None]

_REPORT = re.compile(rb'\s*\{\s*"schema"\s*:\s*"loratool/')


class HomePath(click.Path):
    """A path. ``~`` is the home folder, where a shell left it (``--output=~/x``) too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return _from_home(Path(os.fsdecode(super().convert(value, param, ctx))))


def _from_home(path: Path) -> Path:
    start = Path(*path.parts[:1])
    if not start.name.startswith("~") or start.exists():
        return path
    with suppress(RuntimeError):  # nobody of that name
        return path.expanduser()
    return path


PATH = HomePath(path_type=Path, readable=False)


class FiniteFloat(click.types.FloatParamType):
    """A float that is a number: neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


FINITE = FiniteFloat()


class WeightedPath(click.ParamType[tuple[Path, float]]):
    """A path, or PATH:NUMBER for a path with a weight; a path that exists is taken as it is."""

    name = "path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        if isinstance(value, tuple):
            return value
        path, _, number = str(value).rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            return _from_home(Path(value)), 1.0
        if not path or _from_home(Path(value)).exists():
            return _from_home(Path(value)), 1.0
        if not math.isfinite(weight):
            self.fail(f"{number} is not a finite number", param, ctx)
        return _from_home(Path(path)), weight


WEIGHTED = WeightedPath()


def framed(function: Command) -> Command:
    """Give a command the options all commands have, an Output, and one way to fail."""

    @functools.wraps(function)
    def run(as_json: bool, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
        command = click.get_current_context().info_name or ""
        out = Output(command, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
        try:
            _load_torch()
            for file in (options.get("report"), options.get("csv_file")):
                _check_can_be_written(file, options.get("output"))
            function(out, **options)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except LoratoolError as error:
            _fail(out, error, exit_code(error))
        except KeyboardInterrupt as interrupt:
            out.complain("interrupted; nothing was published")
            _say_notes(out, interrupt)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except OSError as error:
            problem = refusal(error)
            _fail(out, problem, exit_code(problem))
        except Exception as error:
            bug = LoratoolError(
                f"unexpected {type(error).__name__}: {error}",
                hint="this is a bug in loratool; run again with --debug and report it",
            )
            _fail(out, bug, BUG)

    decorated: Command = run
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("-v", "--verbose", is_flag=True, help="Say more: one row per tensor."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    ):
        decorated = option(decorated)
    return decorated


def _check_can_be_written(file: Path | None, output: Path | None) -> None:
    """Of a report or a table, which is written where it is, after the work and its output.

    Raises OutputError.
    """
    if file is None:
        return
    if output is not None and file.resolve() == output.resolve():
        raise OutputError(f"{file}: is the output itself; choose another file for the report")
    from loratool.storage.outputs import check_place

    if not file.exists():
        check_place(file)
    elif not os.access(file, os.W_OK):
        raise OutputError(f"{file}: cannot be written to")


def _load_torch() -> None:
    """Import torch, which every command needs, without the collector walking its modules.

    Frozen, they are not walked later either, which costs a fifth of a second each time.
    """
    gc.disable()
    try:
        import_module("torch")
        gc.freeze()
    finally:
        gc.enable()


def _fail(out: Output, error: LoratoolError, code: int) -> None:
    if out.debug:
        for line in traceback.format_exc().splitlines():
            out.complain(line)
    try:
        out.failure(error, code)
    except OSError:  # stdout takes no document, of an error either
        out.complain(f"error: {error.message}")
    if not out.as_json:
        _say_notes(out, sys.exception())
    sys.exit(code)


def _say_notes(out: Output, error: BaseException | None) -> None:
    for note in getattr(error, "__notes__", ()):
        out.complain(note)


output_option = click.option(
    "-o", "--output", required=True, type=PATH, help="Where the result goes."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an existing output of the same kind."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check everything and say what would happen; write nothing."
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where to compute; auto takes a GPU if there is one.",
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tensors to work on at once (default: the usable cores).",
)
include_option = click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only parameters matching this glob ('c_attn', 'h.0', '*.mlp.*'); repeatable.",
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Not these; repeatable."
)
alpha_option = click.option(
    "--alpha", type=FINITE, help="LoRA alpha, for adapter formats that do not store it."
)
format_option = click.option(
    "--format",
    "format_name",
    default="peft",
    show_default=True,
    metavar="peft|loralib",
    help="Of the result. peft: a folder for PeftModel; loralib: the LoRA authors' own layout, with "
    "one rank and alpha, and updates of linear layers only.",
)


_TABLE = re.compile(rb"(adapter,)?name[,\r\n]")


def _refuse_others(value: Path | None, ours: re.Pattern[bytes], what: str) -> None:
    """A file that begins otherwise than ``ours`` may be an input that was named by mistake."""
    if value is None or not value.is_file():
        return
    with open(value, "rb") as file:
        begin = file.read(200)
    if begin.strip() and not ours.match(begin):
        raise click.BadParameter(f"{value} exists and is no {what} of loratool's; choose another")


def _no_other_table(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """As of a report: a table replaces a table, and nothing else."""
    _refuse_others(value, _TABLE, "table")
    return value


def csv_option(rows: str) -> Callable[[Command], Command]:
    """``--csv``, as csv_file; rows: what a line of it is of."""
    return click.option(
        "--csv",
        "csv_file",
        type=PATH,
        metavar="FILE",
        callback=_no_other_table,
        help=f"Also write a line per {rows}.",
    )


def _no_other_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A report replaces a report, and never the file of an input that was named by mistake."""
    if value is not None and value.is_dir():
        raise click.BadParameter(f"{value} is a folder; a report is a file")
    _refuse_others(value, _REPORT, "report")
    return value


report_option = click.option(
    "--report",
    type=PATH,
    metavar="FILE",
    callback=_no_other_file,
    help="Also write the report to FILE as JSON.",
)
receipt_option = click.option(
    "--receipt",
    type=PATH,
    metavar="FILE",
    help="The receipt, where it is not in the merged folder.",
)
