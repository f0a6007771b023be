"""Words and numbers as a page shows them; what comes from files made harmless."""

from __future__ import annotations

import json
import math
from html import escape
from typing import Any

from loratool.report.page import Cell, Unit


def plain(text: str) -> str:
    """One line without characters that steer: controls, line ends, reversals of direction and lone
    surrogates are written as escapes. Letters of every script stay."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def name(text: str) -> str:
    """Text from a file as HTML: inert, and its direction kept to itself."""
    return f"<bdi>{escape(plain(text))}</bdi>"


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def cell_text(value: Cell, unit: Unit) -> str:
    """A cell in words."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    if unit is Unit.SHARE:
        return percent(value)
    if unit is Unit.BYTES:
        return size_text(value)
    if unit is Unit.COUNT:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
    if unit is Unit.SIGNED:
        return f"{value + 0.0:.3f}"
    return number(value)


def number(value: float) -> str:
    """Four significant digits."""
    if value == 0:
        return "0"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def percent(share: float | None) -> str:
    """0.1234 → '12.34 %'; tiny shares keep two digits, unknown ones are empty."""
    if share is None:
        return ""
    return f"{100 * share:.1e} %" if share != 0 and abs(share) < 1e-4 else f"{100 * share:.2f} %"


def size_text(nbytes: float) -> str:
    """1536 → '1.5 KiB'."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
