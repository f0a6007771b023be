"""``loratool verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.errors import UsageError
from loratool.layouts.families import by_name
from loratool.plural import counted
from loratool.report.text import percent

if TYPE_CHECKING:
    from loratool.ops.verify_claim import ClaimReport
    from loratool.ops.verify_report import VerifyReport
    from loratool.ops.verify_row import VerifyRow

_SHOWN = 12


@click.command("verify")
@click.argument("path", type=options.PATH)
@click.option("--base", type=options.PATH, help="The checkpoint that it was made from.")
@click.option(
    "--adapter",
    "adapters",
    type=options.WEIGHTED,
    multiple=True,
    metavar="PATH[:W]",
    help="What should be merged in, with its weight; repeatable.",
)
@click.option("--tuned", type=options.PATH, help="What the adapter PATH claims to lead to.")
@click.option(
    "--exact", is_flag=True, help="Only correctly rounded values will do: other rounding differs."
)
@click.option(
    "--fast",
    is_flag=True,
    help="Go by the receipt's hashes if there is one, else by a sample of rows.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@options.receipt_option
@options.alpha_option
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@options.framed
def verify_command(
    out: Output,
    path: Path,
    base: Path | None,
    adapters: tuple[tuple[Path, float], ...],
    tuned: Path | None,
    exact: bool,
    fast: bool,
    seed: int,
    receipt: Path | None,
    alpha: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
) -> None:
    """Check a merge, or an adapter's claim. Exit code 1 says that it is not so.

    PATH is a merged checkpoint with --base and --adapter: is every value the base plus the
    adapter's update, and if not, what was done instead? --include and --exclude are those of the
    merge. Or it is an adapter with --base and
    --tuned: does it hold the change between them as well as its report states?

    \b
    Example:
      loratool verify merged/ --base base/ --adapter adapter/
      loratool verify adapter/ --base base/ --tuned tuned/
    """
    from loratool.api.look import verify, verify_adapter

    common = {"alpha": alpha, "device": device, "jobs": jobs, "progress": out.progress()}
    if tuned is not None:
        if adapters or fast or exact or receipt or include or exclude:
            raise UsageError(
                "--tuned asks whether PATH, an adapter, is what it claims; --adapter, --fast, "
                "--exact, --receipt, --include and --exclude are about merged checkpoints"
            )
        if base is None:
            raise UsageError("--tuned needs --base too")
        claim = verify_adapter(path, base, tuned, **common)  # type: ignore[arg-type]
        out.report_file(report, claim.to_json())
        if out.as_json:
            out.document(claim.to_json())
        else:
            _show_claim(out, claim)
        if claim.differs:
            sys.exit(1)
        return
    result = verify(
        path,
        base,
        adapters,
        fast=fast,
        seed=seed,
        receipt=receipt,
        include=include,
        exclude=exclude,
        **common,  # type: ignore[arg-type]
    )
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result)
    if result.differs or (exact and not result.is_equal):
        sys.exit(1)


def _show(out: Output, report: VerifyReport) -> None:
    from loratool.ops.verify_report import DIFFERS, EXACT, excluded_share
    from loratool.ops.verify_row import Status

    updated, total = len(report.updated), len(report.rows)
    if report.verdict == EXACT:
        out.line(
            f"equal: {counted(total, 'tensor is as it', 'tensors are as they')} should be to the "
            f"last bit, {updated} of them with the update"
        )
    elif report.verdict == DIFFERS:
        out.line(
            f"differs: {total - report.count(Status.EQUAL, Status.ROUNDING)} of "
            f"{counted(total, 'tensor')}"
        )
    else:
        out.line(
            f"within rounding: the update is in {counted(updated, 'tensor')}, all of them; rounded "
            f"otherwise than correctly: {report.count(Status.ROUNDING)}"
        )
    for line in report.diagnosis:
        out.line(f"  {line}")
    odd = by_name([row for row in report.rows if row.status is not Status.EQUAL])
    shown = odd if out.verbose else odd[:_SHOWN]
    if shown:
        out.table(
            "tensors",
            ["tensor", "finding", "different", "worst", "at", "fits"],
            [_cells(row) for row in shown],
            text=2,
        )
    if len(odd) > len(shown):
        out.line(f"… {len(odd) - len(shown)} more; -v shows all")
    out.line(f"compared: {report.facts['compared']}")
    if report.facts["seed"] is not None:
        sampled = [row for row in report.rows if row.checked < row.elements]
        rows = min((_rows_checked(row) for row in sampled), default=0)
        if sampled:
            out.line(
                f"a tensor in which more than {percent(excluded_share(rows))} of the rows are "
                "wrong would have been found with 99 % certainty; fewer, or single values, may not"
            )
    out.notes(report.facts["notes"])


def _rows_checked(row: VerifyRow) -> int:
    from loratool.ops.verify import SAMPLED_ROWS

    return SAMPLED_ROWS if row.checked < row.elements else row.elements


def _cells(row: VerifyRow) -> list[str]:
    finding = str(row.status)
    if row.cause is not None:
        finding += f": {row.cause}"
    if row.detail:
        finding += f": {row.detail}"
    compared = row.different and row.checked
    return [
        row.name,
        finding,
        percent(row.different / row.checked) if compared else "",
        f"{row.worst:.3g}" if compared else "",
        str(list(row.worst_at)) if compared else "",
        _fits(row),
    ]


def _fits(row: VerifyRow) -> str:
    if len(row.fits) > 1:
        return ", ".join(f"{one.fit:.4g} ×" for one in row.fits)
    return f"{row.fit:.4g} ×" if row.fit is not None else ""


def _show_claim(out: Output, report: ClaimReport) -> None:
    from loratool.ops.verify_claim import AS_STATED, NOT_AS_STATED, UNSTATED, ClaimStatus

    error = report.relative_error
    missed = f"it misses {percent(error)} of the change" if error is not None else "nothing changed"
    if report.verdict == AS_STATED:
        out.line(f"as stated: {missed}, and every tensor is as its report says")
    elif report.verdict == UNSTATED:
        out.line(f"no report states what to expect: {missed}")
    else:
        out.line(f"differs: {missed}, and its report does not say so")
    for status in (*NOT_AS_STATED, ClaimStatus.LEFT_OUT):
        if report.count(status):
            out.line(
                f"  {counted(report.count(status), 'tensor')} {status} "
                f"({percent(report.share(status))} of the change's energy)"
            )
    if report.unsized:
        out.line(f"  of unknown size, for NaN or infinity: {', '.join(report.unsized)}")
    rows = sorted(by_name(report.rows), key=lambda row: -row.missed_norm)
    if not out.verbose:
        rows = [row for row in rows if row.status is not ClaimStatus.AS_STATED][:_SHOWN]
    if rows:
        out.table(
            "tensors",
            ["tensor", "finding", "‖D‖", "missed", "stated"],
            [
                [
                    row.name,
                    str(row.status),
                    f"{row.delta_norm:.4g}",
                    percent(row.measured),
                    percent(row.stated),
                ]
                for row in rows
            ],
            text=2,
        )
    out.notes(report.facts["notes"])
