"""What one pass over values found, as ``loratool inspect --level values`` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.cli.output import Output
from loratool.layouts.families import by_name
from loratool.plural import counted

if TYPE_CHECKING:
    from loratool.ops.inspect_values import TensorValues

_SHOWN = 20


def show_values(
    out: Output, values: Sequence[TensorValues], equal: Sequence[tuple[str, ...]]
) -> None:
    from loratool.ops.inspect_values import RULES, all_well

    found = [(row.name, "; ".join(row.findings())) for row in by_name(values) if row.findings()]
    if not found:
        out.line(all_well(values))
    else:
        shown = found if out.verbose else found[:_SHOWN]
        out.table(
            f"findings in {len(found)} of {counted(len(values), 'tensor')}",
            ["tensor", "finding"],
            [list(row) for row in shown],
            text=2,
        )
        if len(shown) < len(found):
            out.line(f"… {len(found) - len(shown)} more: -v shows all")
        out.line(RULES)
    for names in equal if out.verbose else equal[:_SHOWN]:
        out.line(f"equal values: {' = '.join(names)}")
    if not out.verbose and len(equal) > _SHOWN:
        out.line(f"… {counted(len(equal) - _SHOWN, 'more group')} of equal tensors: -v shows all")
