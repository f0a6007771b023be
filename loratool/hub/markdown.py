"""Markdown from values that nobody vouches for."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence

_PLAIN = frozenset(string.ascii_letters + string.digits + " .-_,:()/=+[]%")
_MAX_CODE = 160


def code(text: str) -> str:
    """Text as inline code. All but ASCII letters, digits and a few marks is written \\uXXXX."""
    shown = "".join(char if char in _PLAIN else f"\\u{ord(char):04x}" for char in text[:_MAX_CODE])
    ending = "…" if len(text) > _MAX_CODE else ""
    return f"`{shown}{ending}`" if shown.strip() else "` `"


def count(value: int) -> str:
    """A whole number with thin grouping: 1,234."""
    return f"{value:,}"


def percent(share: float | None) -> str:
    """A share of one, with as many digits as tell it from 0 and 100 %."""
    if share is None:
        return "n/a"
    rounded = f"{100 * share:.2f} %"
    if rounded == "0.00 %" and share > 0:
        return f"{100 * share:.1g} %"
    if rounded == "100.00 %" and share < 1:
        return f"100 - {100 * (1 - share):.1g} %"
    return rounded


def small(value: float | None) -> str:
    """A relative error."""
    return "n/a" if value is None or not math.isfinite(value) else f"{value:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> str:
    """A table. ``align`` has one letter per column: l or r. Cells are Markdown already."""
    marks = {"l": ":--", "r": "--:"}
    lines = [head, [marks[letter] for letter in align], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
