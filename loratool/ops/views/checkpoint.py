"""A checkpoint as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.inspect_checkpoint import CheckpointReport
from loratool.ops.views.costs import cost_table
from loratool.ops.views.values import VALUE_COLUMNS, equal_lists, value_cells, value_statements
from loratool.report.page import Column, Page, Row, SmallTable, Unit
from loratool.report.text import size

_HEADERS = (
    Column("bytes", "size", Unit.BYTES, "as stored", mapped=True),
    Column("kind", "kind", Unit.TEXT),
    Column("dtype", "dtype", Unit.TEXT),
    Column("shape", "shape", Unit.TEXT),
)


def checkpoint_page(report: CheckpointReport) -> Page:
    """A row per tensor."""
    values = {row.name: row for row in report.values}
    columns: tuple[Column, ...] = _HEADERS
    if values:
        columns = (*VALUE_COLUMNS[:3], *_HEADERS, VALUE_COLUMNS[3])
    said = [f"tied: {report.tied}"] if report.tied else []
    said += [f"quantised: {report.quantised}"] if report.quantised else []
    kinds = tuple(
        (
            row.kind,
            ", ".join(row.dtypes),
            f"{row.tensors:,}",
            f"{row.parameters:,}",
            size(row.nbytes),
        )
        for row in report.kinds
    )
    return Page(
        kind="Checkpoint",
        title=report.name,
        facts=(
            ("architecture", report.architecture or "not recorded"),
            ("parameters", f"{report.parameters:,}"),
            ("size", size(report.nbytes)),
            ("tensors", f"{len(report.tensors):,}"),
            ("files", f"{report.files:,}"),
            ("level", str(report.level)),
        ),
        columns=columns,
        rows=tuple(
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
        ),
        row_word="tensor",
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
