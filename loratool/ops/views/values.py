"""What one pass over values found, as columns and cells of a page."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.ops.inspect_values import RULES, TensorValues, all_well
from loratool.plural import counted
from loratool.report.page import Cell, Column, NameList, Unit

VALUE_COLUMNS = (
    Column("rms", "RMS", Unit.NUMBER, "root mean square of the values", mapped=True),
    Column("largest", "largest", Unit.NUMBER, "largest magnitude", mapped=True),
    Column("zero_rows", "zero rows", Unit.COUNT, "rows that are zero throughout", mapped=True),
    Column("findings", "findings", Unit.TEXT, RULES),
)


def value_cells(found: TensorValues | None) -> dict[str, Cell]:
    """The cells of one tensor; none where it was not read."""
    if found is None:
        return {}
    cells: dict[str, Cell] = {"findings": "; ".join(found.findings())}
    if (health := found.health) is not None:
        cells |= {"rms": health.rms, "largest": health.largest, "zero_rows": health.zero_rows}
    return cells


def value_statements(values: Sequence[TensorValues]) -> tuple[str, ...]:
    """How many tensors have something to say."""
    if not values:
        return ()
    count = sum(bool(row.findings()) for row in values)
    if not count:
        return (all_well(values),)
    return (f"findings in {count:,} of {counted(len(values), 'tensor')}; {RULES}",)


def equal_lists(equal: Sequence[tuple[str, ...]]) -> tuple[NameList, ...]:
    """Groups of tensors of equal values, a line each."""
    lines = tuple(" = ".join(names) for names in equal)
    return (NameList("Tensors of equal values", lines),) if lines else ()
