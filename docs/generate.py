"""Write the parts of docs/ that come from the code, or with --check say which are out of date.

docs/cli.md: every command's --help. docs/ranks.md's table: the registered rank rules.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"

import click

from loratool.algebra.ranks import REGISTRY
from loratool.cli.errors import EXIT_CODES
from loratool.cli.main import cli

DOCS = Path(__file__).resolve().parent


def help_of(command: click.Command, name: str, parent: click.Context | None = None) -> str:
    """What `NAME --help` prints."""
    context = click.Context(
        command,
        info_name=name,
        parent=parent,
        max_content_width=100,
        terminal_width=100,
        help_option_names=["-h", "--help"],
    )
    return command.get_help(context)


def command_line() -> str:
    """docs/cli.md."""
    root = click.Context(cli, info_name="loratool")
    parts = [
        "# Command line\n",
        "Results go to stdout; progress, notes and errors to stderr. With `--json` stdout holds "
        "exactly one JSON document, also for errors.\n",
        f"```text\n{help_of(cli, 'loratool')}\n```\n",
    ]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        parts.append(f"## loratool {name}\n\n```text\n{help_of(command, name, root)}\n```\n")
    rows = "\n".join(f"| {code} | {meaning} |" for _, code, meaning in EXIT_CODES)
    parts.append(
        "## Exit codes\n\n| code | meaning |\n|---|---|\n| 0 | done |\n"
        f"{rows}\n| 70 | a bug in loratool |\n| 130 | interrupted |\n"
    )
    return "\n".join(parts)


def rank_rules() -> str:
    """docs/ranks.md."""
    rows = "\n".join(
        f"| `{kind.name}{':X' if kind.argument else ''}` | {kind.summary} | {kind.expects} |"
        for kind in REGISTRY.values()
    )
    return (
        "# Rank rules\n\n"
        "`--rank` takes one of these. A bare number means `fixed`. D is the change of one matrix, "
        "σ its singular values.\n\n"
        f"| rule | keeps | X is |\n|---|---|---|\n{rows}\n"
    )


PAGES = {"cli.md": command_line, "ranks.md": rank_rules}


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = DOCS / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run make docs")


if __name__ == "__main__":
    main()
