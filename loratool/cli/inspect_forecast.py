"""What a merge would lose, as ``loratool inspect ADAPTER --base BASE --level values`` shows it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from loratool.cli.output import Output, fitting, span
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import family_of, natural
from loratool.report.text import percent

if TYPE_CHECKING:
    from loratool.ops.inspect_forecast import ForecastReport, ForecastRow

_ORDER = ("module", "tensors", "‖ΔW‖/‖W‖", "σ(ΔW)/σ(W)", "lost in BF16", "lost in F16")
_BY_WORTH = ("lost in BF16", "lost in F16", "σ(ΔW)/σ(W)", "tensors")


SORTS: Sorts[tuple[str, list[ForecastRow]]] = {
    "name": lambda line: natural(line[0]),
    "model": None,
    "lost": lambda line: -max(row.lost_share("BF16") or 0.0 for row in line[1]),
    "norm": lambda line: -max(row.update_norm for row in line[1]),
    "strength": lambda line: -max(row.strength or 0.0 for row in line[1]),
}


def show_forecast(out: Output, report: ForecastReport, sort: str | None = None) -> None:
    families: dict[str, list[ForecastRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    lines = [
        {
            "module": name.removesuffix(".weight"),
            "tensors": str(len(rows)),
            "‖ΔW‖/‖W‖": span([row.update_norm / row.base_norm for row in rows if row.base_norm]),
            "σ(ΔW)/σ(W)": span([row.strength for row in rows if row.strength is not None]),
            **{f"lost in {dtype}": _lost(rows, dtype) for dtype in ("BF16", "F16")},
        }
        for name, rows in in_order(list(families.items()), sort, SORTS)
    ]
    columns = fitting(out.width, lines, _ORDER, ("module", "‖ΔW‖/‖W‖"), _BY_WORTH)
    out.table(
        f"adapter {report.adapter} merged into {report.base}, computed on {report.device}",
        columns,
        [[line.get(column, "") for column in columns] for line in lines],
    )
    for dtype in ("BF16", "F16"):
        if report.lost_share(dtype) is None:
            out.line("the update is zero: there is nothing to lose")
            break
        out.line(
            f"stored in {dtype}, {percent(report.lost_share(dtype))} of the update is lost; "
            f"{percent(report.swallowed_share(dtype))} of its entries change nothing"
        )
    out.line("lost: energy of the rounding of merged values, as a share of the update's")
    if "σ(ΔW)/σ(W)" in columns:
        out.line("σ(ΔW)/σ(W): largest singular value of the update, and of the weight")
    out.notes(report.notes)


def _lost(rows: list[ForecastRow], dtype: str) -> str:
    energy = sum(row.update_norm**2 for row in rows)
    return percent(sum(row.lost_energy[dtype] for row in rows) / energy) if energy else ""
