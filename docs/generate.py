"""Write the parts of docs/ that come from the code, or with --check say which are out of date.

docs/cli.md: every command's --help. docs/ranks.md: the registered rank rules. docs/methods.md: the
registered methods of combining. docs/schemas/: JSON Schemas of what documents.py describes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"

import click
from documents import DOCUMENTS, json_schema

from loratool.algebra.ranks import REGISTRY
from loratool.cli.errors import ALL_CODES
from loratool.cli.main import cli
from loratool.combining.method import Method, Parameter
from loratool.combining.registry import DEFAULT, METHODS
from loratool.ops.extract_rules import BUDGET_RANK

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
    rows = "\n".join(f"| {code} | {meaning} |" for code, meaning in ALL_CODES)
    parts.append(f"## Exit codes\n\n| code | meaning |\n|---|---|\n{rows}\n")
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
        f"| rule | keeps | X is |\n|---|---|---|\n{rows}\n\n"
        "`budget:SIZE` is a number of parameters, a size (`20MB`, in the factors' dtype) or a "
        "share (`2%` of the base's parameters, in `resize` of the adapter's) for the factors of "
        "all matrices together, spent where it lowers Σ‖D − D_r‖² most. `extract` gives the "
        "experts of one parameter one rank, and so all matrices for a consumer that takes one: "
        "what they are padded to is counted. It does not count what is stored whole, nor DoRA's "
        "norms.\n\n"
        "`--min-rank`, `--max-rank` and `--multiple-of` bound what a rule says; a matrix's smaller "
        "side comes before them, and a rule may keep nothing of a matrix unless `--min-rank` is "
        "above 1. A budget goes with `--max-rank` alone, in `resize` with none; without it, "
        f"`extract` gives no matrix a rank above {BUDGET_RANK}.\n"
    )


def methods() -> str:
    """docs/methods.md."""
    spaces: dict[str, str] = {
        "factors": "the factors alone, through inner products",
        "core": "small matrices in joint bases of all factors",
        "dense": "every element of the updates, in blocks of rows; the result is factorised again",
    }
    parts = [
        "# Methods of combining",
        f"`loratool combine --method NAME`; the default is `{DEFAULT}`. They work on the updates "
        "ΔWᵢ = sᵢ·BᵢAᵢ of one weight at a time, with sᵢ the adapter's own scale and wᵢ its weight; "
        "an adapter without an update for it counts as zero. R is the sum of the ranks, (m, n) the "
        "shape. Each result is cut to `--rank`, and the report states the error against the exact "
        "result. See [combining adapters](combine.md).",
        "| method | what it does | works on |\n|---|---|---|\n"
        + "\n".join(
            f"| [`{known.name}`](#{known.name}) | {known.summary} | {known.space} |"
            for known in METHODS.values()
        ),
        "\n".join(f"- **{space}**: {text}" for space, text in spaces.items()),
        *(_method(known) for known in METHODS.values()),
    ]
    return "\n\n".join(parts) + "\n"


def _method(known: Method) -> str:
    least, most = known.adapters
    lines = [
        f"## {known.name}",
        known.summary,
        f"- source: {known.source}",
        f"- cost: {known.cost}",
        f"- weights: {known.weights}",
    ]
    if known.adapters != (1, None):
        lines.append(f"- adapters: {least if least == most else f'{least} or more'}")
    if known.notes:
        lines.append(f"- {known.notes}")
    text = "\n".join([lines[0], "", lines[1], "", *lines[2:]])
    if known.parameters:
        text += "\n\n| parameter | default | values | |\n|---|---|---|---|\n"
        text += "\n".join(_parameter(own) for own in known.parameters)
    return text


def _parameter(own: Parameter) -> str:
    default = str(own.default).lower() if own.kind is bool else own.default
    return f"| `--{own.name.replace('_', '-')}` | {default} | {own.range_text} | {own.help} |"


PAGES = {"cli.md": command_line, "ranks.md": rank_rules, "methods.md": methods}


def schemas() -> dict[str, str]:
    """docs/schemas/: file name → JSON Schema."""
    return {
        f"schemas/{name.replace('/', '-')}.json": json.dumps(json_schema(name), indent=1) + "\n"
        for name in DOCUMENTS
    }


def main() -> None:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    check = parser.parse_args().check
    stale = []
    texts = {name: make() for name, make in PAGES.items()} | schemas()
    left_over = {f"schemas/{path.name}" for path in (DOCS / "schemas").glob("*")} - texts.keys()
    if left_over:
        sys.exit(f"left over: {', '.join(sorted(left_over))}; remove them")
    for name, text in texts.items():
        path = DOCS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run make docs")


if __name__ == "__main__":
    main()
