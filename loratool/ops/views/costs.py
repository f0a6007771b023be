"""What adapters would cost, as a table of a page."""

from __future__ import annotations

from loratool.ops.inspect_cost import Costs
from loratool.plural import counted
from loratool.report.page import SmallTable
from loratool.report.text import size_text

_COLUMNS = (
    *("rank", "parameters", "adapter", "merge", "merge reads", "merge writes", "merge memory"),
    *("extract", "extract reads", "extract memory"),
)


def cost_table(costs: Costs) -> SmallTable:
    """A line per rank. Seconds are estimates, as the title says."""
    return SmallTable(
        f"Adapters on {costs.targets}, of {counted(costs.matrices, 'matrix', 'matrices')}; seconds "
        f"are estimated for {counted(costs.workers, 'worker')} at this machine's speed, files in "
        "memory",
        _COLUMNS,
        tuple(
            (
                str(row.rank),
                f"{row.parameters:,}",
                size_text(row.adapter_bytes),
                f"~{row.merge.seconds:.2g} s",
                size_text(row.merge.read_bytes),
                size_text(row.merge.written_bytes),
                size_text(row.merge.peak_bytes),
                f"~{row.extract.seconds:.2g} s",
                size_text(row.extract.read_bytes),
                size_text(row.extract.peak_bytes),
            )
            for row in costs.rows
        ),
    )
