"""An adapter as ``loratool inspect`` shows it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from loratool.cli.inspect_values import show_values
from loratool.cli.output import Output, fitting, span, spark
from loratool.cli.spectra import SHARES, known_ranks, show_sizes
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import family_of, natural
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.inspect import AdapterReport
    from loratool.ops.inspect_adapter import UpdateRow

_BARS = 16
_ORDER = (
    *("module", "tensors", "rank", "alpha", "scale", "‖ΔW‖", "spectrum"),
    *("90 %", "95 %", "99 %", "stable rank", "effective", "particip."),
)
_BY_WORTH = (
    *("‖ΔW‖", "spectrum", "scale", "alpha", "90 %", "tensors", "stable rank"),
    *("99 %", "effective", "95 %", "particip."),
)


SORTS: Sorts[tuple[str, list[UpdateRow]]] = {
    "name": lambda line: natural(line[0]),
    "model": None,
    "norm": lambda line: -max(row.norm or 0.0 for row in line[1]),
    "rank": lambda line: -max(row.rank for row in line[1]),
    "stable-rank": lambda line: -max(row.stable_rank or 0.0 for row in line[1]),
}


def show_adapter(out: Output, report: AdapterReport, sort: str | None = None) -> None:
    families: dict[str, list[UpdateRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    lines = [
        {
            "module": name.removesuffix(".weight"),
            "tensors": str(len(rows)),
            "rank": span([row.rank for row in rows]),
            "alpha": span([row.alpha for row in rows]),
            "scale": span([row.scale for row in rows]),
            **_spectrum_cells(rows),
        }
        for name, rows in in_order(list(families.items()), sort, SORTS)
    ]
    title = f"adapter {report.name} ({report.format}), base: {report.base_model or 'not recorded'}"
    columns = fitting(out.width, lines, _ORDER, ("module", "rank"), _BY_WORTH) if lines else []
    if lines:
        out.table(title, columns, [[line.get(column, "") for column in columns] for line in lines])
    else:
        out.line(title)
    for other in sorted(report.others, key=lambda row: natural(row["name"]))[:12]:
        out.line(f"{other['name']}: {other['update']}")
    if len(report.others) > 12:
        out.line(f"… {counted(len(report.others) - 12, 'more update')} not of low rank")
    if report.replaced:
        names = ", ".join(sorted((row["name"] for row in report.replaced), key=natural)[:4])
        more = len(report.replaced) - 4
        out.line(
            f"replaces {counted(len(report.replaced), 'parameter')} whole: {names}"
            + (f", … {more} more" if more > 0 else "")
        )
    out.line(f"{report.parameters:,} values, {size_text(report.nbytes)}")
    for name in sorted(report.zero_b, key=natural)[:12]:
        out.line(f"zero B, so that nothing changes: {name}")
    if len(report.zero_b) > 12:
        out.line(f"… {len(report.zero_b) - 12} more with a zero B")
    if report.values:
        show_values(out, report.values, report.equal)
    if any(row.spectrum is not None for row in report.rows):
        show_sizes(
            out,
            "update",
            report.adapter_bytes,
            lambda share: [row.rank_for(share) for row in report.rows],
        )
    if "spectrum" in columns:
        out.line("spectrum: singular values of the strongest update of each row, largest first")
    if "90 %" in columns:
        out.line("90 %, 95 %, 99 %: the rank that keeps this share of an update's energy")
    if "effective" in columns:
        out.line("stable, effective, particip.: three counts of the directions that matter")


def _spectrum_cells(rows: list[UpdateRow]) -> dict[str, str]:
    spectra = [row.spectrum for row in rows if row.spectrum is not None]
    if not spectra:
        return {}
    strongest = max(spectra, key=lambda spectrum: spectrum.total_energy)
    return {
        "‖ΔW‖": span([spectrum.norm for spectrum in spectra]),
        "spectrum": spark(strongest.values[:_BARS].tolist()),
        **{
            f"{100 * share:.0f} %": known_ranks([row.rank_for(share) for row in rows], 0)
            for share in SHARES
        },
        "stable rank": span([spectrum.stable_rank() for spectrum in spectra]),
        "effective": span([spectrum.effective_rank() for spectrum in spectra]),
        "particip.": span([spectrum.participation_ratio() for spectrum in spectra]),
    }
