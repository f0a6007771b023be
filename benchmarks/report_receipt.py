"""What receipt_cost.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_parts import table

INTRO = (
    "What `merge --receipt` keeps so that `unmerge` is exact (`benchmarks/receipt_cost.py`): a "
    "Gaussian 2048×2048 matrix, a rank-16 update; weights that do not follow from the merged ones, "
    "bits kept per weight and per such weight, processor time to encode and decode, per weight."
)


def section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What receipts cost."""
    return [INTRO, receipt_table(rows)]


def receipt_table(rows: Sequence[dict[str, Any]]) -> str:
    """By dtype and size of the update."""
    columns = ("dtype", "‖ΔW‖/‖W0‖", "not guessed", "bit per weight", "bit per miss", "coding")
    cells = [
        (
            row["dtype"],
            f"{100 * row['ratio']:g} %",
            f"{100 * row['missed']:.2f} %",
            f"{row['bits_per_weight']:.3f}",
            f"{row['bits_per_miss']:.1f}",
            f"{row['coding_ns']:.1f} ns",
        )
        for row in rows
    ]
    return table(columns, cells)
