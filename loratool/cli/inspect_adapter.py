"""An adapter as ``loratool inspect`` shows it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from loratool.cli.output import Output, size_text, span, spark

if TYPE_CHECKING:
    from loratool.ops.inspect import AdapterReport
    from loratool.ops.inspect_adapter import UpdateRow

_BARS = 16


def show_adapter(out: Output, report: AdapterReport) -> None:
    from loratool.layouts.families import family_of

    families: dict[str, list[UpdateRow]] = defaultdict(list)
    for row in report.rows:
        families[family_of(row.name)].append(row)
    cells = []
    groups = [[row] for row in report.rows] if out.verbose else list(families.values())
    for rows in groups:
        name = rows[0].name if out.verbose else family_of(rows[0].name)
        strongest = max(rows, key=lambda row: row.norm)
        cells.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                span([row.rank for row in rows]),
                span([row.alpha for row in rows]),
                span([row.scale for row in rows]),
                span([row.norm for row in rows]),
                f"{strongest.stable_rank:.1f}",
                spark(strongest.values[:_BARS]),
            ]
        )
    title = f"adapter {report.name} ({report.format}), base: {report.base_model or 'not recorded'}"
    if cells:
        columns = ["module", "tensors", "rank", "alpha", "scale", "‖ΔW‖", "stable rank", "spectrum"]
        out.table(title, columns, cells)
    else:
        out.line(title)
    for other in report.others[:12]:
        out.line(f"{other['name']}: {other['update']}")
    if len(report.others) > 12:
        out.line(f"… {len(report.others) - 12} more updates that are not low-rank")
    if report.replaced:
        names = ", ".join(row["name"] for row in report.replaced[:4])
        more = len(report.replaced) - 4
        out.line(
            f"replaces {len(report.replaced)} parameters whole: {names}"
            + (f", … {more} more" if more > 0 else "")
        )
    out.line(f"{report.parameters:,} values, {size_text(report.nbytes)}")
    if cells:
        out.line("spectrum: singular values of the strongest update of each row, largest first")
