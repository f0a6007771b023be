"""An adapter as a page, and the rows and facts that several side by side are made of."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.inspect_adapter import AdapterReport, UpdateRow
from loratool.ops.inspect_level import Level
from loratool.ops.views.spectra import SPECTRUM_COLUMNS, sizes_table, spectrum_cells
from loratool.ops.views.values import VALUE_COLUMNS, equal_lists, value_cells, value_statements
from loratool.report.page import Cell, Column, Curve, CurveKind, NameList, Page, Row, Unit
from loratool.report.text import number, size_text

SPECTRA = CurveKind(
    "Singular values of the update", "singular value", "rank", explorable=True, across=True
)
_UPDATE = (
    Column("norm", "‖ΔW‖", Unit.NUMBER, "Frobenius norm of the update", mapped=True),
    *SPECTRUM_COLUMNS,
    Column("rank", "rank", Unit.COUNT, "as stored", mapped=True),
    Column("alpha", "alpha", Unit.NUMBER, mapped=True),
    Column("scale", "scale", Unit.NUMBER, "what B·A is multiplied by", mapped=True),
    Column("shape", "shape", Unit.TEXT),
)
_STORED = (
    *VALUE_COLUMNS[:3],
    Column("dtype", "dtype", Unit.TEXT),
    Column("shape", "shape", Unit.TEXT),
    VALUE_COLUMNS[3],
)


def adapter_page(report: AdapterReport) -> Page:
    """A row per low-rank update; at level values a row per stored tensor."""
    return Page(
        kind="Adapter",
        title=report.name,
        facts=adapter_facts(report),
        columns=adapter_columns(report.level),
        rows=adapter_rows(report),
        row_word=row_word(report.level),
        statements=adapter_statements(report),
        curves=SPECTRA if any(row.values for row in report.rows) else None,
        tables=sizes_table(
            [row.spectrum for row in report.rows if row.spectrum is not None],
            report.adapter_bytes,
        ),
        lists=adapter_lists(report),
    )


def adapter_columns(level: Level) -> tuple[Column, ...]:
    return _STORED if level is Level.VALUES else _UPDATE


def row_word(level: Level) -> str:
    return "tensor" if level is Level.VALUES else "update"


def norm_of(report: AdapterReport) -> float | None:
    """√Σ‖ΔW‖² of the low-rank updates; None where it was not measured."""
    norms = [row.norm for row in report.rows if row.norm is not None]
    return sum(norm**2 for norm in norms) ** 0.5 if norms else None


def ranks_of(report: AdapterReport) -> str:
    ranks = sorted({row.rank for row in report.rows})
    if len(ranks) < 2:
        return "".join(map(str, ranks)) or "none"
    return f"{ranks[0]} to {ranks[-1]}"


def adapter_facts(report: AdapterReport) -> tuple[tuple[str, str], ...]:
    norm = norm_of(report)
    return (
        ("format", report.format),
        ("base", report.base_model or "not recorded"),
        ("low-rank updates", f"{len(report.rows):,}"),
        ("rank", ranks_of(report)),
        *((("‖ΔW‖ of all", number(norm)),) if norm is not None else ()),
        ("values", f"{report.parameters:,}"),
        ("size", size_text(report.nbytes)),
        ("level", str(report.level)),
    )


def adapter_statements(report: AdapterReport) -> tuple[str, ...]:
    said = list(value_statements(report.values))
    if report.replaced:
        said.append(f"parameters replaced whole: {len(report.replaced):,}")
    if report.others:
        said.append(f"updates that are not low-rank, without a row here: {len(report.others):,}")
    if report.zero_b:
        said.append(f"updates with a zero B, which change nothing: {len(report.zero_b):,}")
    return tuple(said)


def adapter_lists(report: AdapterReport, of: str = "") -> tuple[NameList, ...]:
    """What has no row. of: the adapter, where there are several."""
    found = (
        ("Replaced whole", tuple(row["name"] for row in report.replaced)),
        (
            "Updates that are not low-rank",
            tuple(f"{row['name']}: {row['update']}" for row in report.others),
        ),
        ("Updates with a zero B", report.zero_b),
    )
    lists = [NameList(title + of, names) for title, names in found if names]
    lists += [NameList(one.title + of, one.names) for one in equal_lists(report.equal)]
    return tuple(lists)


def adapter_rows(report: AdapterReport, group: int = 0) -> tuple[Row, ...]:
    if report.level is Level.VALUES:
        return tuple(
            Row(
                row.name,
                family_of(row.name),
                layer_of(row.name),
                {
                    **value_cells(row),
                    "dtype": row.dtype.name,
                    "shape": "×".join(map(str, row.shape)),
                },
                group=group,
            )
            for row in report.values
        )
    return tuple(_update(row, group) for row in report.rows)


def _update(row: UpdateRow, group: int) -> Row:
    cells: dict[str, Cell] = {
        "norm": row.norm,
        **spectrum_cells(row.spectrum, complete=True),
        "rank": row.rank,
        "alpha": row.alpha,
        "scale": row.scale,
        "shape": "×".join(map(str, row.shape)),
    }
    curves: tuple[Curve, ...] = ()
    spectrum = row.spectrum
    if spectrum is not None and len(spectrum.values):
        curves = (
            Curve(
                row.values,
                energy=spectrum.total_energy,
                rank_bytes=sum(row.shape) * row.bits / 8,
            ),
        )
    return Row(row.name, family_of(row.name), layer_of(row.name), cells, curves, group)
