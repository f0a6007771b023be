"""What an adapter amplifies in its base, as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.amplification import AmplificationReport, AmplificationRow
from loratool.report.page import Column, Page, Row, Unit

_PHI = "overlap of ΔW's space with that of W's r largest singular values, from 0 to 1"
_COLUMNS = (
    Column("amplification", "amplified", Unit.NUMBER, "‖ΔW‖ / ‖UᵀWV‖ in ΔW's directions", True),
    Column("phi_left", "φ left", Unit.NUMBER, _PHI, True),
    Column("phi_right", "φ right", Unit.NUMBER, _PHI, True),
    Column("relative", "‖ΔW‖ / ‖W‖", Unit.SHARE, "size of the update beside its weight", True),
    Column("delta_norm", "‖ΔW‖", Unit.NUMBER, "Frobenius norm of the update", True),
    Column("base_norm", "‖W‖", Unit.NUMBER, "Frobenius norm of the weight", True),
    Column("inside", "W in ΔW's", Unit.NUMBER, "‖UᵀWV‖ in the r directions of ΔW", True),
    Column("inside_own", "W in its own", Unit.NUMBER, "‖UᵀWV‖ in W's strongest directions", True),
    Column("inside_by_chance", "W in random", Unit.NUMBER, "‖UᵀWV‖ in any r directions", True),
    Column("phi_left_by_chance", "φ left by chance", Unit.NUMBER, "of unrelated spaces"),
    Column("phi_right_by_chance", "φ right by chance", Unit.NUMBER, "of unrelated spaces"),
    Column("rank", "rank", Unit.COUNT, "numerical rank r of ΔW", True),
    Column("shape", "shape", Unit.TEXT),
)


def amplification_page(report: AmplificationReport) -> Page:
    """A row per low-rank update."""
    return Page(
        kind="What an adapter amplifies in its base (Hu et al., 2022, §7.3)",
        title=f"{report.adapter} in {report.base}",
        facts=(("low-rank updates", f"{len(report.rows):,}"), ("computed on", report.device)),
        columns=_COLUMNS,
        rows=tuple(_row(row) for row in report.rows),
        row_word="update",
        notes=report.notes,
    )


def _row(row: AmplificationRow) -> Row:
    cells = {
        **row.to_json(),
        "relative": row.delta_norm / row.base_norm if row.base_norm else None,
        "shape": "×".join(map(str, row.shape)),
    }
    return Row(row.name, family_of(row.name), layer_of(row.name), cells)
