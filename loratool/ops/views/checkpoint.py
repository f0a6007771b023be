"""A checkpoint as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.inspect_checkpoint import CheckpointReport
from loratool.ops.inspect_level import Level
from loratool.ops.inspect_weights import WeightRow
from loratool.ops.views.costs import cost_table
from loratool.ops.views.spectra import SPECTRUM_COLUMNS, spectrum_cells
from loratool.ops.views.values import VALUE_COLUMNS, equal_lists, value_cells, value_statements
from loratool.report.page import Column, Curve, CurveKind, Page, Row, SmallTable, Unit
from loratool.report.text import size_text

_WEIGHTS = (
    Column("norm", "‖W‖", Unit.NUMBER, "Frobenius norm", mapped=True),
    Column("spectral_norm", "σ₁", Unit.NUMBER, "largest singular value", mapped=True),
    *SPECTRUM_COLUMNS,
    Column("kind", "kind", Unit.TEXT),
    Column("shape", "shape", Unit.TEXT),
)
_HEADERS = (
    Column("bytes", "size", Unit.BYTES, "as stored", mapped=True),
    Column("kind", "kind", Unit.TEXT),
    Column("dtype", "dtype", Unit.TEXT),
    Column("shape", "shape", Unit.TEXT),
)


def checkpoint_page(report: CheckpointReport) -> Page:
    """A row per tensor; at level spectra per weight matrix."""
    columns: tuple[Column, ...] = _HEADERS
    if report.level is Level.SPECTRA:
        columns = _WEIGHTS
    elif report.values:
        columns = (*VALUE_COLUMNS[:3], *_HEADERS, VALUE_COLUMNS[3])
    said = [f"tied: {report.tied}"] if report.tied else []
    said += [f"quantised: {report.quantised}"] if report.quantised else []
    kinds = tuple(
        (
            row.kind,
            ", ".join(row.dtypes),
            f"{row.tensors:,}",
            f"{row.parameters:,}",
            size_text(row.nbytes),
        )
        for row in report.kinds
    )
    return Page(
        kind="Checkpoint",
        title=report.name,
        facts=(
            ("architecture", report.architecture or "not recorded"),
            ("values as stored" if report.quantised else "parameters", f"{report.parameters:,}"),
            ("size", size_text(report.nbytes)),
            ("tensors", f"{len(report.tensors):,}"),
            ("files", f"{report.files:,}"),
            ("level", str(report.level)),
        ),
        columns=columns,
        rows=_rows(report),
        row_word="weight" if report.level is Level.SPECTRA else "tensor",
        curves=CurveKind("Singular values of the weight", "singular value", "rank")
        if report.weights
        else None,
        statements=(*said, *value_statements(report.values)),
        tables=(
            SmallTable(
                "Kinds of tensors",
                ("kind", "dtype", "tensors", "parameters", "size"),
                kinds,
                text=(0, 1),
            ),
            *([cost_table(report.costs)] if report.costs is not None else []),
        ),
        lists=equal_lists(report.equal),
    )


def _rows(report: CheckpointReport) -> tuple[Row, ...]:
    if report.level is Level.SPECTRA:
        return tuple(map(_weight, report.weights))
    values = {row.name: row for row in report.values}
    return tuple(
        Row(
            row["name"],
            family_of(row["name"]),
            layer_of(row["name"]),
            {
                **value_cells(values.get(row["name"])),
                "bytes": row["bytes"],
                "kind": row["kind"],
                "dtype": row["dtype"],
                "shape": "×".join(map(str, row["shape"])),
            },
        )
        for row in report.tensors
    )


def _weight(row: WeightRow) -> Row:
    spectrum = row.spectrum
    cells = {
        "norm": spectrum.norm,
        "spectral_norm": row.spectral_norm,
        **spectrum_cells(spectrum, complete=spectrum.is_complete),
        "kind": row.kind,
        "shape": "×".join(map(str, row.shape)),
    }
    curve = Curve(tuple(spectrum.values.tolist()), energy=spectrum.total_energy)
    return Row(row.name, family_of(row.name), layer_of(row.name), cells, (curve,))
