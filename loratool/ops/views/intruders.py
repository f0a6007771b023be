"""Intruder dimensions as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.intruders import IntruderReport, IntruderRow
from loratool.report.page import Cell, Column, Curve, CurveKind, Page, Row, Unit
from loratool.report.text import percent

_COLUMNS = (
    Column("intruders", "intruders", Unit.COUNT, "strong directions that the base lacks", True),
    Column("examined", "examined", Unit.COUNT, "leading directions of the tuned weight", True),
    Column("intruder_energy", "energy", Unit.SHARE, "of the weight, in its intruders", True),
    Column(
        "least_cosine", "least cosine", Unit.NUMBER, "of a direction to any of the base's", True
    ),
    Column("strength", "σ(ΔW) / σ(W0)", Unit.SHARE, "largest singular values compared", True),
    Column("update_spectral_norm", "σ(ΔW)", Unit.NUMBER, "of the change", True),
    Column("base_spectral_norm", "σ(W0)", Unit.NUMBER, "of the base's weight", True),
    Column(
        "sine_at_most", "sine at most", Unit.NUMBER, "of the angle to the true directions", True
    ),
    Column("exact", "decomposed whole", Unit.TEXT),
    Column("shape", "shape", Unit.TEXT),
)


def intruders_page(report: IntruderReport) -> Page:
    """A row per weight examined."""
    examined = sum(len(row.directions) for row in report.rows)
    written = report.mitigated
    return Page(
        kind="Strong directions that the base does not have (Shuttleworth et al., 2024)",
        title=f"{report.tuned} beside {report.base}",
        facts=(
            ("intruders", f"{report.intruders:,} of {examined:,}"),
            ("weights examined", f"{len(report.rows):,}"),
            ("weights that are the base's", f"{report.unchanged:,}"),
            ("directions of each", f"{report.asked.top:,}"),
            ("every cosine below", f"{report.asked.epsilon:g}"),
            ("computed on", report.device),
        ),
        columns=_COLUMNS,
        rows=tuple(_row(row, report.asked.epsilon) for row in report.rows),
        row_word="weight",
        statements=(
            f"written to {written.output}, a {written.kind}: the intruders of {written.tensors:,} "
            f"weights at {written.factor:g} of their size, error {percent(written.error)}",
        )
        if written
        else (),
        notes=report.notes,
        curves=CurveKind("Cosine of each strong direction", "cosine", "direction", most=1.0)
        if report.rows
        else None,
    )


def _row(row: IntruderRow, epsilon: float) -> Row:
    cosines = tuple(direction.cosine for direction in row.directions)
    cells: dict[str, Cell] = {
        "intruders": row.intruders,
        "examined": len(row.directions),
        "intruder_energy": row.intruder_energy,
        "least_cosine": min(cosines, default=None),
        "strength": row.strength,
        "update_spectral_norm": row.update_value,
        "base_spectral_norm": row.base_value,
        "sine_at_most": row.sine,
        "exact": "yes" if row.exact else "no",
        "shape": "×".join(map(str, row.shape)),
    }
    curve = Curve(cosines, floor=epsilon, floor_label="intruders below")
    return Row(
        row.name, family_of(row.name), layer_of(row.name), cells, (curve,) if cosines else ()
    )
