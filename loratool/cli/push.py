"""``loratool push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, printable
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.push import PushPlan, PushReport


@click.command("push")
@click.argument("adapter", type=options.PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="The base's Hub name, if the adapter does not hold it or holds a local path.",
)
@click.option("--private", is_flag=True, help="Create the repository private.")
@click.option("--license", "licence", metavar="ID", help="For the card, such as apache-2.0.")
@click.option("--revision", metavar="BRANCH", help="An existing branch [default: main].")
@click.option("--message", metavar="TEXT", help="The commit's message.")
@click.option("--picture", is_flag=True, help="Draw where the updates are strong, for the card.")
@options.dry_run_option
@options.framed
def push_command(
    out: Output,
    adapter: Path,
    repository: str,
    base_model: str | None,
    private: bool,
    licence: str | None,
    revision: str | None,
    message: str | None,
    picture: bool,
    dry_run: bool,
) -> None:
    """Publish ADAPTER, a PEFT adapter folder, as OWNER/NAME on the Hugging Face Hub.

    The repository is created if it does not exist. Config, weights, report and a model card go
    up as one commit. Text that somebody wrote in a README.md is kept. Log in with
    `hf auth login` or HF_TOKEN first.

    \b
    Example:
      loratool push adapter/ alice/my-adapter --license apache-2.0
      loratool push adapter/ alice/my-adapter --dry-run --picture
    """
    from loratool.ops.push import plan_push, run_push

    plan = plan_push(
        adapter,
        repository,
        base_model=base_model,
        private=private,
        licence=licence,
        revision=revision,
        message=message,
        picture=picture,
        progress=out.progress(),
    )
    if dry_run:
        _show_plan(out, plan)
        return
    report = run_push(plan, out.progress())
    if out.as_json:
        out.document(report.to_json())
    else:
        _show(out, plan, report)


def _show_plan(out: Output, plan: PushPlan) -> None:
    from loratool.provenance import document

    if out.as_json:
        out.document(document("push-plan", 1, plan.to_json()))
        return
    where = " (private if it is new)" if plan.private else ""
    out.line(f"would push to {plan.facts.repo_id}{where}")
    _show_files(out, plan.files)
    out.line(f"card: {plan.card_origin}, unless the repository holds one with its own text")
    _verbatim(out, ["", *plan.card.splitlines(), ""])
    _show_rest(out, plan)
    out.notes(plan.notes)


def _show(out: Output, plan: PushPlan, report: PushReport) -> None:
    pushed = report.pushed
    visibility = "private" if pushed.private else "public"
    verb = "pushed to" if pushed.changed else "nothing to change:"
    _verbatim(out, [f"{verb} {pushed.url} ({visibility})", f"commit: {pushed.commit_url}"])
    if out.verbose:
        _show_files(out, report.files)
    out.line(f"card: {pushed.card}")
    _show_rest(out, plan)
    out.notes(report.notes)


def _verbatim(out: Output, lines: list[str]) -> None:
    """Lines that must not be wrapped: a card, addresses."""
    if not out.quiet:
        click.echo("\n".join(map(printable, lines)))


def _show_files(out: Output, files: dict[str, int]) -> None:
    out.table("files", ["file", "size"], [[name, size_text(size)] for name, size in files.items()])


def _show_rest(out: Output, plan: PushPlan) -> None:
    if plan.not_uploaded:
        out.notes([f"not uploaded: {', '.join(plan.not_uploaded)}"])
