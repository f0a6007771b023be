"""A grid of shares in colour blocks, or in characters where there is no colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratool.cli.output import Output
from loratool.report.text import percent

_SHADES = "·░▒▓█"
_ASCII_SHADES = ".-=*#"
_COLOURS = (236, 24, 31, 37, 71, 148, 220)
"""Of the 256 that terminals have, from dark blue to yellow: they differ in lightness, too."""
_MARGIN = 3


def show_heatmap(
    out: Output, title: str, rows: Mapping[str, Mapping[int, float]], columns: Sequence[int]
) -> None:
    """One line per row, a block for each column (a layer); several layers share a block, which
    then shows the largest of theirs, where the terminal is too narrow. The faintest block is of
    zeros alone, infinities have the strongest.
    """
    every = (value for row in rows.values() for value in row.values())
    top = max(filter(math.isfinite, every), default=0.0)
    if top <= 0 or not columns:
        return
    names = {name: _end(name, out.width // 3, "…" if out.has_unicode else "..") for name in rows}
    label = max(len(name) for name in names.values())
    room = max(8, out.width - label - _MARGIN)
    together = -(-len(columns) // room)
    groups = [columns[i : i + together] for i in range(0, len(columns), together)]
    wide = max(1, min(4, room // len(groups)))
    steps = _COLOURS if out.has_colour else _SHADES if out.has_unicode else _ASCII_SHADES
    each = f", {together} layers to a block" if together > 1 else ""
    out.line()
    out.line(f"{title} (layers {columns[0]} to {columns[-1]}{each})")
    for name, values in rows.items():
        cells: list[tuple[str, str | None]] = [(f"{names[name]:>{label}} ", None)]
        for group in groups:
            present = [values[layer] for layer in group if layer in values]
            share = min(1.0, max(present, default=0.0) / top)
            cells.append(_block(share, len(steps), out, wide) if present else _gap(wide))
        out.coloured(cells)
    shares = (0.0, *((index + 0.5) / (len(steps) - 1) for index in range(len(steps) - 1)))
    scale = [_block(share, len(steps), out, 1) for share in shares]
    out.coloured([(f"{'0':>{label}} ", None), *scale, (f" {percent(top)}", None)])
    out.line()


def _end(name: str, most: int, cut: str) -> str:
    """The end of a long name, where names differ, and a mark that it is not all of it."""
    return name if len(name) <= most else cut + name[len(name) - max(1, most - len(cut)) :]


def _gap(wide: int) -> tuple[str, str | None]:
    return " " * wide, None


def _block(share: float, steps: int, out: Output, wide: int) -> tuple[str, str | None]:
    index = 1 + min(steps - 2, int(share * (steps - 1))) if share else 0
    if out.has_colour:
        return " " * wide, f"on color({_COLOURS[index]})"
    return (_SHADES if out.has_unicode else _ASCII_SHADES)[index] * wide, None
