"""What bench_combine.py measured, as Markdown."""

from __future__ import annotations

from typing import Any

from report_parts import Row, table, target

OVER_RIVAL = 300.0
INTRO = (
    "The seven linear modules of one Llama layer of that width, rank-16 adapters, without reading "
    'and writing. PEFT: `add_weighted_adapter(combination_type="svd")`, the sum made dense and a '
    "full SVD; ours is `combine --method svd`, through the factors, its error measured. Resizing "
    "from rank 32 to 16: kohya's `resize_lora`, a dense SVD of the product. Rivals run one matrix "
    "of each shape, once; its seconds are multiplied by how many the layer has. Errors: of the "
    "worst of those matrices."
)
COLUMNS = ("what", "width", "loratool", "rival", "faster", "error", "rival's error")


def section(measured: dict[str, Any]) -> list[str]:
    """Combining and resizing, against PEFT and kohya."""
    return [INTRO, table(COLUMNS, _rows(measured))]


def targets(measured: dict[str, Any]) -> list[Row]:
    """How many times faster."""
    return [
        target(
            f"{rival} ÷ {what}, slowest layer",
            _slowest(measured, what),
            OVER_RIVAL,
            "×",
            least=True,
        )
        for what, rival in (("combine", "PEFT"), ("resize", "kohya"))
    ]


def _rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per layer."""
    combined = [_row(f"combine {row['adapters']}", row) for row in measured["combine"]]
    return combined + [_row("resize", row) for row in measured["resize"]]


def _slowest(measured: dict[str, Any], what: str) -> float:
    """The smallest ratio of ``combine`` or ``resize``."""
    return min(row["ratio"] for row in measured[what])


def _row(what: str, row: dict[str, Any]) -> tuple[str, ...]:
    ours, rival = row["ours"], row["rival"]
    return (
        what,
        str(row["width"]),
        f"{1000 * ours['seconds']:.0f} ms",
        f"{rival['seconds']:.1f} s",
        f"{row['ratio']:,.0f} ×",
        f"{ours['error']:.6f}",
        f"{rival['error']:.6f}",
    )
