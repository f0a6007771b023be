"""What adapters would cost, as ``loratool inspect --cost`` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.cli.output import Output, fitting
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.inspect_cost import Costs

_ORDER = (
    *("rank", "parameters", "adapter", "merge", "merge reads", "merge writes", "merge memory"),
    *("extract", "extract reads", "extract memory"),
)
_ALWAYS = ("rank", "adapter", "merge", "extract")
_BY_WORTH = (
    *("parameters", "extract memory", "merge memory", "merge reads", "merge writes"),
    "extract reads",
)


def show_costs(out: Output, costs: Costs) -> None:
    lines = [
        {
            "rank": str(row.rank),
            "parameters": f"{row.parameters:,}",
            "adapter": size_text(row.adapter_bytes),
            "merge": f"~{row.merge.seconds:.2g} s",
            "merge reads": size_text(row.merge.read_bytes),
            "merge writes": size_text(row.merge.written_bytes),
            "merge memory": size_text(row.merge.peak_bytes),
            "extract": f"~{row.extract.seconds:.2g} s",
            "extract reads": size_text(row.extract.read_bytes),
            "extract memory": size_text(row.extract.peak_bytes),
        }
        for row in costs.rows
    ]
    columns = fitting(out.width, lines, _ORDER, _ALWAYS, _BY_WORTH)
    out.table(
        f"an adapter on {costs.targets}, {counted(costs.matrices, 'matrix', 'matrices')}",
        columns,
        [[line[column] for column in columns] for line in lines],
    )
    out.line(
        f"seconds: estimated for {counted(costs.workers, 'worker')} of this machine's speed, files "
        "in memory; starting up and slow disks come on top"
    )
