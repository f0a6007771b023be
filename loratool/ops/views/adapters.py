"""Several adapters side by side, as a page."""

from __future__ import annotations

from loratool.ops.inspect_adapters import AdaptersReport
from loratool.ops.views.adapter import (
    SPECTRA,
    adapter_columns,
    adapter_lists,
    adapter_rows,
    adapter_statements,
    norm_of,
    ranks_of,
    row_word,
)
from loratool.plural import counted
from loratool.report.page import Group, Page, SmallTable, letter
from loratool.report.text import number, size_text


def adapters_page(report: AdaptersReport) -> Page:
    """A row per adapter and update."""
    adapters = report.adapters
    lines = []
    for position, one in enumerate(adapters):
        norm = norm_of(one)
        lines.append(
            (
                letter(position),
                one.name,
                one.format,
                one.base_model or "not recorded",
                f"{len(one.rows):,}",
                f"{len(one.replaced) + len(one.others):,}",
                ranks_of(one),
                "" if norm is None else number(norm),
                f"{one.parameters:,}",
                size_text(one.nbytes),
            )
        )
    columns = ("", "adapter", "format", "base", "updates", "other", "rank", "‖ΔW‖", "values")
    return Page(
        kind="Adapters side by side",
        title=f"{counted(len(adapters), 'adapter')}",
        facts=(("adapters", str(len(adapters))), ("level", str(report.level))),
        columns=adapter_columns(report.level),
        rows=tuple(
            row for position, one in enumerate(adapters) for row in adapter_rows(one, position)
        ),
        row_word=row_word(report.level),
        statements=tuple(
            f"{letter(position)}: {said}"
            for position, one in enumerate(adapters)
            for said in adapter_statements(one)
        ),
        groups=tuple(Group(letter(position), one.name) for position, one in enumerate(adapters)),
        curves=SPECTRA if any(row.values for one in adapters for row in one.rows) else None,
        tables=(SmallTable("Adapters", (*columns, "size"), tuple(lines), text=(0, 1, 2, 3)),),
        lists=tuple(
            named
            for position, one in enumerate(adapters)
            for named in adapter_lists(one, f", {letter(position)}")
        ),
    )
