"""What bench_combine.py measured, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OVER_RIVAL = 300.0
INTRO = (
    "One weight matrix at a time, rank-16 adapters, without reading and writing. PEFT: "
    '`add_weighted_adapter(combination_type="svd")`, the sum made dense and a full SVD; ours is '
    "`combine --method svd`, through the factors. Resizing from rank 32 to 16: kohya's "
    "`resize_lora`, a dense SVD of the product. Rivals are timed on the square matrices, once."
)
COLUMNS = ("what", "shape", "loratool", "rival", "faster", "error", "rival's error")


def rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per matrix."""
    combined = [
        _row(f"combine {row['adapters']}", row, row.get("peft"), row["ours"]["error"])
        for row in measured["combine"]
    ]
    return combined + [_row("resize", row, row.get("kohya"), None) for row in measured["resize"]]


def slowest(measured: dict[str, Any], what: str) -> float:
    """The smallest ratio of ``combine`` or ``resize``."""
    return min(row["ratio"] for row in measured[what] if "ratio" in row)


def _row(
    what: str, row: dict[str, Any], rival: dict[str, float] | None, error: float | None
) -> tuple[str, ...]:
    shape: Sequence[int] = row["shape"]
    return (
        what,
        "×".join(map(str, shape)),
        f"{1000 * row['ours']['seconds']:.1f} ms",
        f"{rival['seconds']:.1f} s" if rival else "",
        f"{row['ratio']:,.0f} ×" if rival else "",
        f"{error:.6f}" if error is not None else "",
        f"{rival['error']:.6f}" if rival and "error" in rival else "",
    )
