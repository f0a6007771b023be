"""What every section of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def table(columns: Row, rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target(what: str, measured: float, limit: float, unit: str, *, least: bool = False) -> Row:
    """A row of the table of targets. least: the limit is a lower one."""
    met = measured >= limit if least else measured <= limit
    sign = "≥" if least else "≤"
    return (
        what,
        f"{measured:.2g}{unit}" if measured < 1 else f"{measured:.1f}{unit}",
        f"{sign} {limit:,.0f}{unit}" if limit >= 100 else f"{sign} {limit:.2g}{unit}",
        "met" if met else "**not met**",
    )


def size(count: float) -> str:
    """Of so many bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def percent(share: float) -> str:
    """Of a share of one."""
    return f"{100 * share:.2g} %"


def shape_of(row: dict[str, Any]) -> str:
    """Of a measured matrix."""
    return "×".join(map(str, row["shape"]))
