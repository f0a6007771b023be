"""What bench_memory.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report_parts import Row, size, table, target


def section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Memory by the number of layers."""
    return [
        "Peak resident memory of the commands, start-up included.",
        table(["layers", "checkpoint", "merge", "extract"], _rows(rows)),
    ]


def targets(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """It does not grow with them."""
    first, last = rows[0], rows[-1]
    growth = max(last[key] / first[key] - 1 for key in ("merge_peak_bytes", "extract_peak_bytes"))
    layers = f"{first['layers']} to {last['layers']} layers"
    return [target(f"peak memory, growth from {layers}", 100 * growth, 5.0, " %")]


def _rows(rows: Sequence[dict[str, Any]]) -> list[Row]:
    sizes = ("bytes", "merge_peak_bytes", "extract_peak_bytes")
    return [(str(row["layers"]), *(size(row[key]) for key in sizes)) for row in rows]
