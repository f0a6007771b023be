"""What an adapter amplifies in its base, as ``loratool inspect --base`` shows it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from loratool.cli.output import Output, span
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import family_of, natural

if TYPE_CHECKING:
    from loratool.ops.amplification import AmplificationReport, AmplificationRow


SORTS: Sorts[tuple[str, list[AmplificationRow]]] = {
    "name": lambda line: natural(line[0]),
    "model": None,
    "amplification": lambda line: -max(row.amplification or 0.0 for row in line[1]),
    "norm": lambda line: -max(row.delta_norm for row in line[1]),
    "rank": lambda line: -max(row.rank for row in line[1]),
}


def show_amplification(out: Output, report: AmplificationReport, sort: str | None = None) -> None:
    families: dict[str, list[AmplificationRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    cells = []
    for name, rows in in_order(list(families.items()), sort, SORTS):
        factors = [row.amplification for row in rows if row.amplification is not None]
        left = [row.phi_left for row in rows if row.phi_left is not None]
        right = [row.phi_right for row in rows if row.phi_right is not None]
        cells.append(
            [
                name.removesuffix(".weight"),
                span([row.rank for row in rows]),
                span([row.delta_norm for row in rows]),
                span([row.base_norm for row in rows]),
                span([row.inside for row in rows]),
                span([row.inside_own for row in rows]),
                span([row.inside_by_chance for row in rows]),
                span(factors) if factors else "",
                span([*left, *right]) if left else "",
            ]
        )
    what = "the change to" if report.of_pair else "adapter"
    out.table(
        f"{what} {report.adapter} in {report.base}, computed on {report.device}",
        ["module", "r", "‖ΔW‖", "‖W‖", "ΔW's", "W's", "random", "amplified", "φ"],
        cells,
    )
    out.line(
        "ΔW's, W's, random: ‖UᵀWV‖, how much of W lies in r directions, those of ΔW, W's own "
        "strongest, or any"
    )
    out.line("amplified: ‖ΔW‖ / ‖UᵀWV‖ with the directions of ΔW (Hu et al., 2022, §7.3)")
    chance = [value for row in report.rows for value in row.phi_by_chance]
    out.line(
        "φ, left and right: 1 where ΔW lies in the r strongest directions of W, "
        f"about {span(chance)} for unrelated ones"
    )
    out.notes(report.notes)
