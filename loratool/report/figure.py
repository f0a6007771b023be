"""A page's map and spectra as one picture for papers and model cards, as Vega-Lite."""

from __future__ import annotations

import math
from typing import Any

from loratool.errors import UsageError
from loratool.report.charts import WHOLE_NUMBERS
from loratool.report.drawing import Spec
from loratool.report.page import Column, Group, Page, Row, Unit, is_number
from loratool.report.text import plain

MAPS = 4
"""Adapters or pairs whose maps one picture holds."""

_FAMILIES = 100
_LINES = 8
_POINTS = 128
_LABEL = 40
_FORMATS = {Unit.SHARE: ".3~p", Unit.BYTES: ".2~s", Unit.SIGNED: ".2f", Unit.COUNT: ",.3~r"}
_COLOURS = [
    *("#1d68a7", "#c2570c", "#007a5e", "#a83279", "#8a8000", "#2f9ed0", "#6d4fc2", "#5b6670"),
]
_CONFIG: Spec = {
    "background": "white",
    "font": "Liberation Sans, Arial, sans-serif",
    "view": {"stroke": None},
    "title": {"anchor": "start", "fontSize": 13, "fontWeight": 600, "offset": 10},
    "axis": {
        "labelColor": "#333333",
        "titleColor": "#333333",
        "titleFontWeight": 500,
        "domainColor": "#999999",
        "tickColor": "#999999",
        "gridColor": "#e5e5e5",
        "labelLimit": 220,
    },
    "legend": {"titleFontWeight": 500, "labelLimit": 260, "titleLimit": 260},
}


def figure(page: Page) -> Spec:
    """The map of the page's first figure, and beside it singular values where there are any.

    Raises UsageError for a page without a figure to draw.
    """
    if not page.mapped:
        raise UsageError(
            f"{plain(page.title)}: nothing to draw at this level",
            hint="choose --level values or spectra; --html shows what has no figures, too",
        )
    column = page.mapped[0]
    shown = range(min(MAPS, max(1, len(page.groups))))
    maps = [_map(page, column, group) for group in shown] if _has_map(page) else []
    if not maps:
        maps = [_bars(page, column)]
    left: Spec = maps[0] if len(maps) == 1 else {"vconcat": maps, "spacing": 24}
    right = _spectra(page)
    return {
        "config": _CONFIG,
        "padding": 16,
        "title": {
            "text": _short(page.title, 90),
            "subtitle": _subtitle(page),
            "fontSize": 16,
            "subtitleColor": "#555555",
            "offset": 16,
        },
        "resolve": {"scale": {"color": "independent"}},
        "hconcat": [left, right] if right else [left],
        "spacing": 36,
    }


def alt_text(page: Page) -> str:
    """What the picture shows, without any name from a file."""
    about = []
    if page.mapped and _has_map(page):
        about.append(f"Map of {page.mapped[0].label} by layer and module")
    elif page.mapped:
        about.append(f"Bars: {page.mapped[0].label} of the {page.row_word}s that have most")
    if _strongest(page):
        about.append(f"{page.curves.title.lower()} on a logarithmic scale" if page.curves else "")
    return ", and ".join(filter(None, about)) or page.kind


def _subtitle(page: Page) -> str:
    left_out = len(page.groups) - MAPS
    more = f"; maps of the first {MAPS} of {len(page.groups)}" if left_out > 0 else ""
    return page.kind + more


def _short(text: str, most: int = _LABEL) -> str:
    """An end of a long name tells more than its start."""
    text = plain(text)
    return text if len(text) <= most else "…" + text[1 - most :]


def _has_map(page: Page) -> bool:
    return page.has_map and len(page.layers) > 1 and len(page.families) <= _FAMILIES


def _number(cell: Any) -> float | None:
    return float(cell) if is_number(cell) else None


def _map(page: Page, column: Column, group: int) -> Spec:
    """The largest of each place; the scale is that of all groups, so that maps compare."""
    largest: dict[tuple[str, int], float] = {}
    for row in page.rows:
        value = _number(row.cells.get(column.key))
        if row.group == group and row.layer is not None and value is not None:
            place = row.family, row.layer
            if place not in largest or abs(value) > abs(largest[place]):
                largest[place] = value
    for place in page.still:
        largest.setdefault(place, 0.0)
    values = [_number(row.cells.get(column.key)) for row in page.rows if row.layer is not None]
    top = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    signed = column.unit is Unit.SIGNED and any(value is not None and value < 0 for value in values)
    labels = {family: _unique(family, index) for index, family in enumerate(page.families)}
    title = _group(page.groups[group]) if len(page.groups) > 1 else None
    ticks = [str(layer) for layer in page.layers]
    count = len(ticks)
    return {
        **({"title": title} if title else {}),
        "width": max(120, min(520, 24 * count)),
        "height": {"step": 20},
        "data": {
            "values": [
                {"family": labels[family], "layer": str(layer), "value": value}
                for (family, layer), value in largest.items()
            ]
        },
        "mark": {"type": "rect", "stroke": "white", "strokeWidth": 1 if count < 60 else 0},
        "encoding": {
            "x": {
                "field": "layer",
                "type": "ordinal",
                "title": "layer",
                "scale": {"domain": ticks},
                "axis": {
                    "labelAngle": 0,
                    "values": ticks[:: max(1, math.ceil(count / 16))],
                },
            },
            "y": {
                "field": "family",
                "type": "nominal",
                "title": None,
                "sort": None,
                "scale": {"domain": list(labels.values())},
            },
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": column.label,
                "scale": {"scheme": "purpleorange", "reverse": True, "domain": [-top, top]}
                if signed
                else {"scheme": "blues", "domain": [0, top]},
                "legend": {"format": _FORMATS.get(column.unit, ".3~g"), "gradientLength": 120},
            },
        },
    }


def _group(group: Group) -> str:
    return f"{group.label}: {_short(group.name)}"


def _unique(family: str, index: int) -> str:
    """A label; two families whose ends are alike stay two."""
    short = _short(family)
    return short if len(plain(family)) <= _LABEL else f"{short} ({index + 1})"


def _bars(page: Page, column: Column) -> Spec:
    """Where there are no layers to lay out: the rows with the largest figures."""
    found = [
        (row, value)
        for row in page.rows
        if (value := _number(row.cells.get(column.key))) is not None
    ]
    found = sorted(found, key=lambda pair: -abs(pair[1]))[:24]
    left_out = len(page.rows) - len(found)
    return {
        "width": 320,
        "height": {"step": 18},
        "title": f"the {len(found)} largest of {len(page.rows)}" if left_out else "",
        "data": {
            "values": [
                {"name": f"{index + 1}. {_short(row.name)}", "value": value}
                for index, (row, value) in enumerate(found)
            ]
        },
        "mark": {"type": "bar", "color": _COLOURS[0]},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "title": None, "sort": None},
            "x": {
                "field": "value",
                "type": "quantitative",
                "title": column.label,
                "axis": {"format": _FORMATS.get(column.unit, ".3~g"), "tickCount": 5},
            },
        },
    }


def _strongest(page: Page) -> dict[str, Row]:
    """Label → the row with most energy: of each adapter, or of each family of one."""
    if page.curves is None or page.curves.most is not None:
        return {}
    found: dict[str, Row] = {}
    for row in page.rows:
        if not row.curves or not row.curves[0].energy:
            continue
        label = row.family
        if len(page.groups) > 1:
            label = _group(page.groups[row.group])
        if label not in found or row.curves[0].energy > found[label].curves[0].energy:
            found[label] = row
    if len(page.groups) > 1:
        ordered = sorted(found.items(), key=lambda item: item[1].group)
    else:
        ordered = sorted(found.items(), key=lambda item: -item[1].curves[0].energy)
    return dict(ordered[:_LINES])


def _spectra(page: Page) -> Spec | None:
    rows = _strongest(page)
    if not rows or page.curves is None:
        return None
    labels = [_short(label) for label in rows]
    labels = [
        text if labels.count(text) == 1 else f"{text} ({i + 1})" for i, text in enumerate(labels)
    ]
    what = "adapter" if len(page.groups) > 1 else "kind"
    points = [
        {"index": index + 1, "value": value, "series": label}
        for label, row in zip(labels, rows.values(), strict=True)
        for index, value in enumerate(row.curves[0].values[:_POINTS])
        if value > 0
    ]
    longest = max(len(row.curves[0].values) for row in rows.values())
    part = f" (first {_POINTS})" if longest > _POINTS else ""
    return {
        "title": {
            "text": f"{page.curves.title}{part}",
            "subtitle": f"of the strongest {page.row_word} of each {what}",
            "subtitleColor": "#555555",
        },
        "width": 360,
        "height": 240,
        "data": {"values": points},
        "mark": {"type": "line", "strokeWidth": 1.75},
        "encoding": {
            "x": {
                "field": "index",
                "type": "quantitative",
                "title": page.curves.index,
                "axis": WHOLE_NUMBERS,
                "scale": {"nice": False, "zero": False},
            },
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": page.curves.axis,
                "scale": {"type": "log"},
                "axis": {"tickCount": 5, "format": ".2~g"},
            },
            "color": {
                "field": "series",
                "type": "nominal",
                "title": None,
                "sort": labels,
                "scale": {"domain": labels, "range": _COLOURS[: len(labels)]},
                "legend": {"orient": "bottom", "columns": 2, "symbolType": "stroke"},
            },
        },
    }
