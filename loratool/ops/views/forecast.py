"""What merging an adapter would lose, as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.inspect_forecast import OUTPUTS, ForecastReport, ForecastRow
from loratool.report.page import Column, Page, Row, Unit
from loratool.report.text import percent

_COLUMNS = (
    *(
        Column(f"lost_{dtype.name}", f"lost in {dtype.name}", Unit.SHARE, about, True)
        for dtype in OUTPUTS
        for about in [f"energy of the rounding to {dtype.name}, as a share of the update's"]
    ),
    *(
        Column(f"swallowed_{dtype.name}", f"swallowed in {dtype.name}", Unit.SHARE, about, True)
        for dtype in OUTPUTS
        for about in [f"of the entries that change, those that stay as they are in {dtype.name}"]
    ),
    Column("relative", "‖ΔW‖ / ‖W‖", Unit.SHARE, "size of the update beside its weight", True),
    Column("strength", "σ(ΔW) / σ(W)", Unit.SHARE, "largest singular values compared", True),
    Column("update_norm", "‖ΔW‖", Unit.NUMBER, "Frobenius norm of the update", True),
    Column("base_norm", "‖W‖", Unit.NUMBER, "Frobenius norm of the weight", True),
    Column("spectral_norm", "σ(ΔW)", Unit.NUMBER, "largest singular value of the update", True),
    Column("base_spectral_norm", "σ(W)", Unit.NUMBER, "largest singular value of the weight", True),
    Column("dtype", "dtype of base", Unit.TEXT),
)


def forecast_page(report: ForecastReport) -> Page:
    """A row per weight that the adapter adds to."""
    lost = [(f"lost in {one.name}", report.lost_share(one.name)) for one in OUTPUTS]
    lost += [(f"swallowed in {one.name}", report.swallowed_share(one.name)) for one in OUTPUTS]
    return Page(
        kind="What a merge would lose to rounding",
        title=f"{report.adapter} merged into {report.base}",
        facts=(
            *((label, percent(value) or "nothing") for label, value in lost),
            ("weights added to", f"{len(report.rows):,}"),
            ("computed on", report.device),
        ),
        columns=_COLUMNS,
        rows=tuple(_row(row) for row in report.rows),
        row_word="weight",
        notes=report.notes,
    )


def _row(row: ForecastRow) -> Row:
    cells = {
        **{f"lost_{dtype.name}": row.lost_share(dtype.name) for dtype in OUTPUTS},
        **{f"swallowed_{dtype.name}": row.swallowed_share(dtype.name) for dtype in OUTPUTS},
        "relative": row.update_norm / row.base_norm if row.base_norm else None,
        "strength": row.strength,
        "update_norm": row.update_norm,
        "base_norm": row.base_norm,
        "spectral_norm": row.spectral_norm,
        "base_spectral_norm": row.base_spectral_norm,
        "dtype": row.dtype,
    }
    return Row(row.name, family_of(row.name), layer_of(row.name), cells)
