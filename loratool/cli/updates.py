"""How commands that make an adapter from adapters show what they did."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.cli.output import Output, fitting
from loratool.layouts.families import by_name, family_of
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.combine_report import UpdateRow, UpdatesReport


def show_updates(out: Output, report: UpdatesReport, title: str, output: Path) -> None:
    """Tables by module family (by weight with -v), totals, notes."""
    if out.verbose:
        out.table(
            "every weight",
            ["parameter", "shape", "ranks", "rank", "error", "share"],
            [
                [
                    row.name,
                    "×".join(map(str, row.shape)),
                    " ".join(map(str, row.ranks)),
                    str(row.rank),
                    percent(row.relative_error),
                    percent(row.energy / report.energy if report.energy else 0.0),
                ]
                for row in by_name(report.rows)
            ],
        )
    lines = _families(report)
    columns = fitting(out.width, lines, _ORDER, ("module", "rank", "error"), _BY_WORTH)
    out.table(title, columns, [[line[column] for column in columns] for line in lines])
    out.line(
        f"relative error {percent(report.relative_error)} of the exact result, as stored in "
        f"{report.facts['dtype']}"
    )
    out.line(
        f"adapter: {report.adapter_parameters:,} values, {size_text(report.adapter_bytes)} "
        f"in {output}"
    )
    out.notes(report.notes)


_ORDER = ("module", "weights", "ranks", "rank", "error", "share")
_BY_WORTH = ("ranks", "share", "weights")


def _families(report: UpdatesReport) -> list[dict[str, str]]:
    from loratool.ops.combine_report import error_of

    families: dict[str, list[UpdateRow]] = defaultdict(list)
    for row in by_name(report.rows):
        families[family_of(row.name).removesuffix(".weight")].append(row)
    return [
        {
            "module": family,
            "weights": str(len(rows)),
            "ranks": " ".join(
                _span([row.ranks[i] for row in rows]) for i in range(len(rows[0].ranks))
            ),
            "rank": _span([row.rank for row in rows]),
            "error": percent(error_of(rows)),
            "share": percent(
                sum(row.energy for row in rows) / report.energy if report.energy else 0.0
            ),
        }
        for family, rows in families.items()
    ]


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
