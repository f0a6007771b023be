"""Several adapters side by side, as ``loratool inspect A B C`` shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.cli.output import Output, fitting, span
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import natural
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.inspect import AdapterReport, AdaptersReport

_ORDER = (
    *("adapter", "format", "base", "updates", "other", "rank", "alpha", "scale", "‖ΔW‖"),
    *("stable rank", "findings", "targets", "values", "size"),
)
_BY_WORTH = (
    *("‖ΔW‖", "findings", "scale", "updates", "size", "stable rank", "targets"),
    *("other", "base", "alpha", "format", "values"),
)
_TARGETS = 4


SORTS: Sorts[AdapterReport] = {
    "given": None,
    "name": lambda report: natural(report.name),
    "norm": lambda report: -sum(row.norm**2 for row in report.rows if row.norm is not None),
    "rank": lambda report: -max((row.rank for row in report.rows), default=0),
    "size": lambda report: -report.nbytes,
}


def show_side_by_side(out: Output, report: AdaptersReport, sort: str | None = None) -> None:
    """A line per adapter; of what differs within one, the span."""
    reports = in_order(report.adapters, sort, SORTS)
    lines = [_line(report) for report in reports]
    columns = fitting(out.width, lines, _ORDER, ("adapter", "rank"), _BY_WORTH)
    out.table(
        f"{counted(len(reports), 'adapter')}",
        columns,
        [[line.get(column, "") for column in columns] for line in lines],
    )
    if "‖ΔW‖" in columns:
        out.line("‖ΔW‖: of all low-rank updates together; stable rank: lowest to highest")
    if "findings" in columns:
        out.line("findings: tensors with something to say; one adapter alone shows them")
    out.line("how much they overlap, and what combining them would do: loratool compare")


def _line(report: AdapterReport) -> dict[str, str]:
    rows = report.rows
    norms = [row.norm for row in rows if row.norm is not None]
    names = sorted({_target(row.name) for row in rows})
    more = f" +{len(names) - _TARGETS}" if len(names) > _TARGETS else ""
    return {
        "adapter": report.name,
        "format": report.format,
        "base": report.base_model or "not recorded",
        "updates": str(len(rows)),
        "other": str(len(report.replaced) + len(report.others) or ""),
        "rank": span([row.rank for row in rows]),
        "alpha": span([row.alpha for row in rows]),
        "scale": span([row.scale for row in rows]),
        "‖ΔW‖": f"{sum(norm**2 for norm in norms) ** 0.5:.3g}" if norms else "",
        "stable rank": span([row.stable_rank for row in rows if row.stable_rank is not None]),
        "findings": str(sum(bool(row.findings()) for row in report.values))
        if report.values
        else "",
        "targets": ",".join(names[:_TARGETS]) + more,
        "values": f"{report.parameters:,}",
        "size": size_text(report.nbytes),
    }


def _target(name: str) -> str:
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdecimal()]
    return parts[-1].removesuffix("_proj")
