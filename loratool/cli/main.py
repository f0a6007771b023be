"""``loratool``: the command group. Commands are imported when run, so that --help is quick."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from importlib import import_module

import click

from loratool.cli.errors import ALL_CODES, INTERRUPTED
from loratool.cli.startup import start_sooner

GROUPS: dict[str, dict[str, str]] = {
    "Surgery": {
        "extract": "An adapter from a base and a tuned checkpoint.",
        "merge": "An adapter into a checkpoint.",
        "recover": "Finish or undo an interrupted merge --in-place.",
        "unmerge": "An adapter out of a checkpoint again.",
        "swap": "One adapter out of a checkpoint and another in.",
    },
    "Adapters": {
        "combine": "Several adapters into one.",
        "convert": "An adapter in another layout, or for another base.",
        "init": "An adapter to train from.",
        "resize": "An adapter at another rank.",
    },
    "Look": {
        "list": "Every adapter and checkpoint below folders.",
        "inspect": "What a checkpoint, an adapter or a fine-tune consists of.",
        "verify": "Is a merge, or an adapter, what it should be?",
        "compare": "How alike adapters are, and what combining them would do.",
        "estimate": "What a LoRA of a model costs to train, store, merge and extract.",
    },
    "Hub": {"push": "Publish an adapter with a model card."},
}
"""Command name → its line in the overview. The command itself is cli/NAME.py's NAME_command."""


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in GROUPS.values() for name in commands]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = getattr(import_module(f"loratool.cli.{name}"), f"{name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in ALL_CODES])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="loratool", prog_name="loratool")
def cli() -> None:
    """Model surgery and adapter management for LoRA.

    \b
    Example:
      loratool extract base/ tuned/ -o adapter/ --rank 16
      loratool merge base/ adapter/ -o merged/
    """


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if argv is None else argv
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where ‖ or × cannot be shown, an escape can
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(args=arguments, prog_name="loratool", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        if "--json" in arguments:
            _usage_error_as_json(arguments, error)
        else:
            error.show()
        sys.exit(error.exit_code)
    except OSError as error:  # of what is printed before a command begins: its help
        sys.exit(_unprinted(error))
    sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Streams that came closed (``>&-``) lead nowhere, or the first files to be opened are they."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _unprinted(error: OSError) -> int:
    """The exit code where stdout took no more; who closed a pipe knows."""
    if isinstance(error, BrokenPipeError):
        return 1
    with suppress(OSError):
        print(f"error: standard output: {error.strerror}", file=sys.stderr, flush=True)
    return 5


def entry() -> None:
    """The installed command: like ``main``, and gone at once when done.

    Taking torch's modules down one by one costs almost half a second, for nothing.
    """
    start_sooner()
    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    try:
        with suppress(ValueError):  # closed
            sys.stdout.flush()
    except OSError as error:
        code = code or _unprinted(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    if "torch" in sys.modules and sys.gettrace() is None and isinstance(code, int | None):
        os._exit(code or 0)
    sys.exit(code if isinstance(code, int | str | None) else 1)


def _usage_error_as_json(arguments: list[str], error: click.ClickException) -> None:
    import json

    from loratool.cli.output import error_document
    from loratool.errors import UsageError

    command = next((word for word in arguments if not word.startswith("-")), "")
    problem = UsageError(error.format_message())
    print(json.dumps(error_document(command, "UsageError", problem, error.exit_code)))
