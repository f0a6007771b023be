"""The page's charts as Vega-Lite specifications. The page's script fills their named data.

Colours are the style sheet's variables, so that charts follow light, dark and print by
themselves. What a chart says, the page says in words and in a table beside it.
"""

from __future__ import annotations

from typing import Any

from loratool.report.drawing import Spec
from loratool.report.page import CurveKind, Page

SERIES = 8
"""Colours of series; later ones begin again."""

WHOLE_NUMBERS = {
    "grid": False,
    "tickMinStep": 1,
    "labelExpr": "datum.value % 1 ? '' : datum.label",
}
"""An axis of counts; a least step alone still gives halves on short ones."""

_COLOUR = {
    "field": "s",
    "type": "nominal",
    "legend": None,
    "scale": {
        "domain": list(range(SERIES)),
        "range": [f"var(--s{index})" for index in range(SERIES)],
    },
}
_BYTES = (
    "datum.value < 1024 ? datum.value + ' B' : datum.value < 1048576 ? "
    "format(datum.value / 1024, '.3~g') + ' KiB' : datum.value < 1073741824 ? "
    "format(datum.value / 1048576, '.3~g') + ' MiB' : "
    "format(datum.value / 1073741824, '.3~g') + ' GiB'"
)
_CONFIG = {
    "aria": False,
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--rule)",
        "tickColor": "var(--rule)",
        "gridColor": "var(--rule)",
        "gridOpacity": 0.6,
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": 500,
        "titlePadding": 10,
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "text": {"fontSize": 12},
}


def page_charts(page: Page) -> dict[str, Spec]:
    """Chart → specification, of those charts that the page has."""
    charts = {}
    if page.curves is not None:
        charts["curve"] = _curve(page.curves)
        if page.curves.explorable:
            charts["tradeoff"] = _tradeoff()
    if len(page.groups) > 1 and len(page.layers) > 1 and page.mapped:
        charts["layers"] = _by_layer()
    return charts


def _chart(height: int, layers: list[Spec]) -> Spec:
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": _CONFIG,
        "resolve": {"scale": {"color": "independent"}},
        "layer": layers,
    }


def _curve(kind: CurveKind) -> Spec:
    """Data: points and dots {i, v, s}, floor {y, label}, cuts {x, label, own, row, left}."""
    vertical: dict[str, Any] = {
        "scale": {"type": "log"} if kind.most is None else {"domain": [0, kind.most]}
    }
    x: dict[str, Any] = {"field": "i", "type": "quantitative", "title": kind.index}
    x |= {"axis": WHOLE_NUMBERS}
    x |= {"scale": {"nice": False, "padding": 8}}
    y: dict[str, Any] = {"field": "v", "type": "quantitative", "title": kind.axis, **vertical}
    y |= {"axis": {"format": ".4~g", "tickCount": 5}}
    along: Spec = {"x": {"field": "x", "type": "quantitative", "axis": x["axis"]}}
    colour: Spec = {
        "field": "own",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": [0, 1], "range": ["var(--muted)", "var(--accent)"]},
    }
    return _chart(
        260,
        [
            {
                "data": {"name": "points"},
                "mark": {"type": "line", "strokeWidth": 1.75},
                "encoding": {"x": x, "y": y, "color": _COLOUR},
            },
            {
                "data": {"name": "dots"},
                "mark": {"type": "point", "size": 24, "filled": True, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": _COLOUR},
            },
            {
                "data": {"name": "floor"},
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": "var(--warn)"},
                "encoding": {"y": {"field": "y", "type": "quantitative"}},
            },
            {
                "data": {"name": "floor"},
                "mark": {
                    "type": "text",
                    "align": "left",
                    "baseline": "bottom",
                    "dx": 6,
                    "dy": -3,
                    "x": 0,
                    "color": "var(--warn)",
                },
                "encoding": {
                    "y": {"field": "y", "type": "quantitative"},
                    "text": {"field": "label"},
                },
            },
            {
                "data": {"name": "cuts"},
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {**along, "color": colour},
            },
            *(_cut_label(along, colour, left=left) for left in (False, True)),
        ],
    )


def _cut_label(along: Spec, colour: Spec, *, left: bool) -> Spec:
    """The words beside a vertical line, on the side that has room."""
    row = {"field": "row", "type": "quantitative", "scale": None}
    return {
        "data": {"name": "cuts"},
        "transform": [{"filter": "datum.left" if left else "!datum.left"}],
        "mark": {
            "type": "text",
            "align": "right" if left else "left",
            "baseline": "top",
            "dx": -4 if left else 4,
        },
        "encoding": {**along, "y": row, "text": {"field": "label"}, "color": colour},
    }


def _tradeoff() -> Spec:
    """Data: frontier {bytes, error, s}, here {bytes, error}."""
    x = {
        "field": "bytes",
        "type": "quantitative",
        "title": "adapter size",
        "scale": {"type": "log", "base": 2, "nice": False},
        "axis": {"labelExpr": _BYTES, "grid": False, "tickCount": 5, "labelOverlap": "greedy"},
    }
    y = {
        "field": "error",
        "type": "quantitative",
        "title": "relative error",
        "scale": {"domainMin": 0},
        "axis": {"format": ".0%", "tickCount": 5},
    }
    return _chart(
        240,
        [
            {
                "data": {"name": "frontier"},
                "mark": {"type": "line", "strokeWidth": 1.75},
                "encoding": {"x": x, "y": y, "color": _COLOUR},
            },
            {
                "data": {"name": "here"},
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 90,
                    "color": "var(--accent)",
                    "opacity": 1,
                    "stroke": "var(--surface)",
                },
                "encoding": {"x": x, "y": y},
            },
        ],
    )


def _by_layer() -> Spec:
    """Data: layers {layer, value, s}."""
    return _chart(
        220,
        [
            {
                "data": {"name": "layers"},
                "mark": {"type": "line", "strokeWidth": 1.75, "point": {"size": 22}},
                "encoding": {
                    "x": {
                        "field": "layer",
                        "type": "quantitative",
                        "title": "layer",
                        "axis": WHOLE_NUMBERS,
                        "scale": {"nice": False, "padding": 8},
                    },
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": None,
                        "axis": {"tickCount": 5, "format": ".3~g"},
                    },
                    "color": _COLOUR,
                },
            }
        ],
    )
