"""A pair of checkpoints as a page."""

from __future__ import annotations

from collections import Counter

from loratool.layouts.families import family_of, layer_of
from loratool.ops.findings import nothing_changed
from loratool.ops.inspect_level import Level
from loratool.ops.inspect_pair import DeltaRow, PairReport
from loratool.ops.views.spectra import SPECTRUM_COLUMNS, sizes_table, spectrum_cells
from loratool.plural import counted
from loratool.report.page import (
    Column,
    Curve,
    CurveKind,
    NameList,
    Page,
    Row,
    Unit,
)
from loratool.report.text import number, percent

_CHANGE = (
    Column("change", "change", Unit.SHARE, "‖W − W0‖ / ‖W0‖", mapped=True),
    Column("energy_share", "share of energy", Unit.SHARE, "of the whole change ‖W − W0‖²", True),
    Column("delta_norm", "‖W − W0‖", Unit.NUMBER, "Frobenius norm of the change", True),
    Column("changed_share", "entries changed", Unit.SHARE, "share of entries that differ", True),
)
_SPECTRA = (
    *SPECTRUM_COLUMNS,
    Column(
        "above_noise", "above noise", Unit.COUNT, "singular values above what rounding makes", True
    ),
    Column("gavish_donoho", "Gavish–Donoho", Unit.COUNT, "above the optimal threshold", True),
    Column("lora_rank", "LoRA rank", Unit.COUNT, "of the LoRA that explains the change", True),
)
_ABOUT = (Column("kind", "kind", Unit.TEXT), Column("shape", "shape", Unit.TEXT))


def pair_page(report: PairReport) -> Page:
    """At level headers a row per tensor, else a row per tensor that changed."""
    if report.level is Level.HEADERS:
        return _headers_page(report)
    matrices = report.matrices
    whole = sum(row.delta_norm**2 for row in report.rows if row.spectrum is None)
    return Page(
        kind="What fine-tuning changed",
        title=f"{report.base} → {report.tuned}",
        facts=_facts(report),
        columns=(*_CHANGE, *(_SPECTRA if matrices else ()), *_ABOUT),
        rows=tuple(_row(row, report.energy) for row in report.rows),
        statements=_statements(report),
        notes=report.notes,
        curves=CurveKind("Singular values of the change", "singular value", "rank", explorable=True)
        if matrices
        else None,
        still=tuple(
            (family_of(name), layer)
            for name in report.unchanged
            if (layer := layer_of(name)) is not None
        ),
        tables=sizes_table(
            [row.spectrum for row in matrices if row.spectrum is not None], report.adapter_bytes
        ),
        lists=(NameList("Unchanged tensors", report.unchanged),) if report.unchanged else (),
        outside_share=whole / report.energy if report.energy else 0.0,
    )


def _facts(report: PairReport) -> tuple[tuple[str, str], ...]:
    base = sum(row.base_norm**2 for row in report.rows) ** 0.5
    total = len(report.rows) + len(report.unchanged)
    return (
        ("tensors changed", f"{len(report.rows):,} of {total:,}"),
        ("change, of their norm", _share_of(report.energy**0.5, base)),
        ("‖W − W0‖", number(report.energy**0.5)),
        ("with a spectrum", f"{len(report.matrices):,}"),
        ("level", str(report.level)),
        ("computed on", report.device),
    )


def _share_of(change: float, base: float) -> str:
    return percent(change / base) if base else "from zero" if change else "none"


def _statements(report: PairReport) -> tuple[str, ...]:
    said = []
    if not report.rows:
        said.append(nothing_changed(report.base, report.tuned, len(report.unchanged)))
    if summary := report.lora_summary():
        said.append(summary)
    return (*said, *_header_statements(report))


def _header_statements(report: PairReport) -> list[str]:
    dtypes = Counter(
        (row.base_dtype, row.tuned_dtype)
        for row in report.paired
        if row.base_dtype != row.tuned_dtype
    )
    said = [f"{counted(count, 'tensor')} went from {a} to {b}" for (a, b), count in dtypes.items()]
    return said + [
        f"{row.name}: {counted(row.added_rows, 'token')} added"
        for row in report.paired
        if row.added_rows
    ]


def _row(row: DeltaRow, energy: float) -> Row:
    spectrum, body = row.spectrum, row.to_json()
    cells = {
        "change": row.relative_change,
        "energy_share": row.delta_norm**2 / energy if energy else None,
        "delta_norm": row.delta_norm,
        "changed_share": row.changed_share,
        **spectrum_cells(spectrum, complete=spectrum is not None and spectrum.is_complete),
        **{key: body[key] for key in ("above_noise", "gavish_donoho", "lora_rank")},
        "kind": row.kind,
        "shape": "×".join(map(str, row.shape)),
    }
    curves: tuple[Curve, ...] = ()
    if spectrum is not None:
        curves = (
            Curve(
                tuple(spectrum.values.tolist()),
                energy=spectrum.total_energy,
                floor=spectrum.noise_floor or None,
                rank_bytes=row.values_for(1) * row.bits / 8,
                rank=row.lora_rank if row.lora_rank is not None else row.above_noise,
                rank_label="LoRA rank" if row.lora_rank is not None else "above noise",
            ),
        )
    return Row(row.name, family_of(row.name), layer_of(row.name), cells, curves)


def _headers_page(report: PairReport) -> Page:
    kinds = Counter(row.kind for row in report.paired)
    return Page(
        kind="What two checkpoints' headers say",
        title=f"{report.base} → {report.tuned}",
        facts=(
            ("tensors in both", f"{len(report.paired):,}"),
            *((kind, f"{count:,}") for kind, count in kinds.most_common()),
            ("level", str(report.level)),
        ),
        columns=(
            Column("added_rows", "tokens added", Unit.COUNT),
            Column("kind", "kind", Unit.TEXT),
            Column("base_dtype", "dtype of base", Unit.TEXT),
            Column("tuned_dtype", "dtype of tuned", Unit.TEXT),
        ),
        rows=tuple(
            Row(
                row.name,
                family_of(row.name),
                layer_of(row.name),
                {
                    "added_rows": row.added_rows,
                    "kind": row.kind,
                    "base_dtype": row.base_dtype,
                    "tuned_dtype": row.tuned_dtype,
                },
            )
            for row in report.paired
        ),
        row_word="tensor",
        statements=tuple(_header_statements(report)),
        notes=report.notes,
    )
