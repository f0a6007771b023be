"""A page as one HTML document that needs nothing else: no network, no other file.

Text from files enters as escaped text or as JSON without ``<``, ``>`` and ``&``; the scripts that
may run are named by their hashes in the document's own policy, which forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import math
from html import escape
from importlib.resources import files
from typing import Any

from loratool.plural import counted
from loratool.provenance import loratool_version
from loratool.report.charts import SERIES, page_charts
from loratool.report.drawing import library
from loratool.report.page import Cell, Column, Group, Page, Row, Unit, values_per_curve
from loratool.report.text import cell_text, embedded, name, plain

_VALUES = 200_000
"""Of all curves together that a page holds, so that it opens fast."""

_ROWS = 10_000
_DIGITS = 8


def render_page(page: Page) -> str:
    """The document. Raises MissingExtra."""
    page = page.limited(_ROWS)
    scripts = (library(), _asset("page.js"))
    policy = (
        "default-src 'none'; "
        f"script-src {' '.join(map(_hash, scripts))}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    title = f"{plain(page.title)}: {page.kind.lower()}"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<meta name="generator" content="loratool {escape(loratool_version())}">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            *_body(page),
            f'<script type="application/json" id="page-data">{embedded(page_data(page))}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        )
    )


def page_data(page: Page) -> dict[str, Any]:
    """What the script gets: the rows' figures and curves, column by column, and the charts."""
    most = values_per_curve(page.rows, _VALUES)
    families = {family: index for index, family in enumerate(page.families)}
    layers = {layer: index for index, layer in enumerate(page.layers)}
    return {
        "word": page.row_word,
        "groupWord": page.group_word,
        "groups": [plain(group.name) for group in page.groups],
        "letters": [group.label for group in page.groups],
        "stillWord": page.still_word,
        "families": [plain(family) for family in page.families],
        "hasMap": page.has_map,
        "layers": list(map(str, page.layers)),
        "still": [[families[family], layers[layer]] for family, layer in page.still],
        "columns": [
            {
                "key": column.key,
                "label": column.label,
                "unit": str(column.unit),
                "about": column.about,
                "mapped": column in page.mapped,
            }
            for column in page.columns
        ],
        "names": [plain(row.name) for row in page.rows],
        "family": [families.get(row.family, -1) for row in page.rows],
        "layer": [None if row.layer is None else layers[row.layer] for row in page.rows],
        "group": [row.group for row in page.rows],
        "cells": {
            column.key: [_value(row.cells.get(column.key)) for row in page.rows]
            for column in page.columns
            if column.unit is not Unit.TEXT
        },
        "curves": [_curves(row, most) for row in page.rows] if page.curves else [],
        "curveKind": {
            "title": page.curves.title,
            "index": page.curves.index,
            "log": page.curves.most is None,
            "axis": page.curves.axis,
            "explorable": page.curves.explorable,
            "across": page.curves.across,
        }
        if page.curves
        else None,
        "outsideShare": page.outside_share,
        "series": SERIES,
        "charts": page_charts(page),
    }


def _curves(row: Row, most: int) -> list[dict[str, Any]]:
    return [
        {
            "label": curve.label,
            "values": [float(f"{value:.{_DIGITS}g}") for value in curve.values],
            "held": curve.held,
            "energy": curve.energy,
            "floor": curve.floor,
            "floorLabel": curve.floor_label,
            "bytes": curve.rank_bytes,
            "rank": curve.rank,
            "rankLabel": curve.rank_label,
        }
        for curve in (curve.cut(most) for curve in row.curves)
    ]


def _value(cell: Cell) -> Cell:
    """A number as it is; what JSON has no word for as text."""
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _asset(file: str) -> str:
    return (files("loratool.report") / file).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# Sections --------------------------------------------------------------------------------------


def _body(page: Page) -> list[str]:
    return [
        '<a class="skip" href="#modules">Skip to the table</a>',
        "<header>",
        f'<p class="kind">{escape(page.kind)}</p>',
        f"<h1>{name(page.title)}</h1>",
        "</header>",
        "<main>",
        *_overview(page),
        *_map(page),
        *(_explorer() if page.curves is not None and page.curves.explorable else ()),
        *(_by_layer(page) if "layers" in page_charts(page) else ()),
        "<noscript>The table holds everything; the map and the charts need scripts.</noscript>",
        *_table(page),
        *_lists(page),
        "</main>",
        f"<footer>Made by loratool {escape(loratool_version())}. This page holds all its data "
        "and asks for nothing from a network.</footer>",
        '<p id="said" class="hidden" role="status"></p>',
    ]


def _overview(page: Page) -> list[str]:
    facts = [
        f"<div><dt>{name(label)}</dt><dd>{name(value)}</dd></div>" for label, value in page.facts
    ]
    parts = [
        '<section aria-labelledby="overview-title">',
        '<h2 id="overview-title">Overview</h2>',
        f'<dl class="facts">{"".join(facts)}</dl>',
    ]
    parts += [f'<p class="statement">{name(text)}</p>' for text in page.statements]
    if page.notes:
        notes = "".join(f"<li>{name(note)}</li>" for note in page.notes)
        parts.append(f'<ul class="notes" aria-label="Notes">{notes}</ul>')
    for table in page.tables:
        head = "".join(
            f'<th scope="col"{_left(index in table.text)}>{name(column) if column else ""}</th>'
            if column
            else "<td></td>"
            for index, column in enumerate(table.columns)
        )
        lines = [
            "".join(
                f'<th scope="row" class="t">{name(cell)}</th>'
                if index == 0
                else f"<td{_left(index in table.text)}>{name(cell)}</td>"
                for index, cell in enumerate(line)
            )
            for line in table.rows
        ]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">'
            f'<table class="small"><caption>{name(table.title)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return [*parts, "</section>"]


def _map(page: Page) -> list[str]:
    if not page.rows:
        return []
    mapped = page.mapped
    options = "".join(
        f'<option value="{escape(column.key)}">{escape(column.label)}</option>' for column in mapped
    )
    parts = ['<section aria-labelledby="map-title" class="look">', '<div class="map-side">']
    if mapped:
        parts += [
            '<h2 id="map-title">Map</h2>',
            '<div class="controls">',
            f'<label>Colour by <select id="metric">{options}</select></label>',
            *_group_choice(page),
            "</div>",
            '<p id="metric-about" class="about"></p>',
            '<div id="map" class="scroll"></div>',
            '<div id="legend" class="legend"></div>',
            '<div id="outside"></div>',
            "</div>",
            '<div class="module-side">',
        ]
    else:
        parts += ['<h2 id="map-title">One by one</h2>']
    parts += [
        f'<h3 id="module-title">Choose a {escape(page.row_word)}</h3>',
        '<p id="module-place" class="about"></p>',
    ]
    if page.curves is not None:
        parts += [
            '<figure id="curve-figure" aria-labelledby="curve-title">',
            f'<p id="curve-title" class="chart-title">{escape(page.curves.title)}</p>',
            '<div id="curve-legend" class="legend"></div>',
            '<div id="curve" class="chart" aria-hidden="true"></div>',
            '<figcaption id="curve-words"></figcaption>',
            '<details id="curve-data"><summary>These values as a table</summary>'
            '<div class="scroll" tabindex="0" role="region" aria-label="Values"></div></details>',
            "</figure>",
        ]
    parts += ['<div id="module-facts" class="scroll"></div>', "</div>", "</section>"]
    return parts


def _group_choice(page: Page) -> list[str]:
    if len(page.groups) < 2:
        return []
    options = "".join(
        f'<option value="{index}">{escape(f"{group.label}: {plain(group.name)}")}</option>'
        for index, group in enumerate(page.groups)
    )
    word = page.group_word.capitalize()
    return [f'<label>{escape(word)} <select id="group">{options}</select></label>']


def _explorer() -> list[str]:
    return [
        '<section aria-labelledby="explorer-title" class="look">',
        '<div class="map-side">',
        '<h2 id="explorer-title">How much rank?</h2>',
        '<p class="about">What an adapter would cost and lose, computed here from the singular '
        "values. The map can be coloured by the ranks that come out.</p>",
        '<fieldset class="controls"><legend class="hidden">What is given</legend>',
        '<label><input type="radio" name="mode" value="rank" checked> one rank for all</label>',
        '<label><input type="radio" name="mode" value="budget"> a size, spent where it counts'
        "</label>",
        "</fieldset>",
        '<div id="by-rank" class="slider"><label for="rank">Rank</label>'
        '<input type="range" id="rank" min="0" step="1">'
        '<input type="number" id="rank-number" min="0" step="1" aria-label="Rank as a number">'
        "</div>",
        '<div id="by-budget" class="slider" hidden><label for="budget">Size</label>'
        '<input type="range" id="budget" min="0" max="1000" step="1">'
        '<span id="budget-text"></span></div>',
        '<output id="outcome"></output>',
        '<p id="limits" class="about"></p>',
        "</div>",
        '<div class="module-side">',
        '<figure aria-labelledby="tradeoff-title">',
        '<p id="tradeoff-title" class="chart-title">Error and size</p>',
        '<div class="legend"><span class="key s0">one rank for all</span>'
        '<span class="key s1">ranks where they count</span></div>',
        '<div id="tradeoff" class="chart" aria-hidden="true"></div>',
        '<details id="tradeoff-data"><summary>These values as a table</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Error by rank"></div>'
        "</details>",
        "</figure>",
        "</div>",
        "</section>",
    ]


def _by_layer(page: Page) -> list[str]:
    word = page.group_word
    return [
        '<section aria-labelledby="layers-title">',
        f'<h2 id="layers-title">{escape(word.capitalize())}s by layer</h2>',
        '<figure aria-labelledby="layers-title">',
        '<p id="layers-about" class="about"></p>',
        '<div id="layers-legend" class="legend"></div>',
        '<div id="layers" class="chart" aria-hidden="true"></div>',
        '<details id="layers-data"><summary>These values as a table</summary>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Means by layer"></div>'
        "</details>",
        "</figure>",
        "</section>",
    ]


def _table(page: Page) -> list[str]:
    if not page.rows:
        return []
    explorable = page.curves is not None and page.curves.explorable
    several = len(page.groups) > 1
    heads = [_head(page.row_word, "", "t")]
    heads += [_head(page.group_word, "", "t")] if several else []
    heads += [_head(c.label, c.about, "t" if c.unit is Unit.TEXT else "") for c in page.columns]
    heads += [_head("rank chosen", "by the explorer above", "")] if explorable else []
    lines = "\n".join(_line(row, page.columns, page.groups, explorable) for row in page.rows)
    word = page.row_word
    return [
        '<section aria-labelledby="modules-title" id="modules">',
        f'<h2 id="modules-title">All {escape(word)}s</h2>',
        '<div class="controls">',
        '<label>Filter by name <input type="search" id="filter" autocomplete="off" '
        'spellcheck="false"></label>',
        f'<span id="count" role="status">{counted(len(page.rows), "row")}</span>',
        "</div>",
        '<div class="scroll tall" tabindex="0" role="region" '
        f'aria-label="Table of {escape(word)}s">',
        f'<table id="rows"><caption class="hidden">A row per {escape(word)}; the buttons in the '
        "heading sort</caption>",
        f"<thead><tr>{''.join(heads)}</tr></thead>",
        f"<tbody>\n{lines}\n</tbody></table>",
        "</div>",
        '<button type="button" id="more" hidden></button>',
        "</section>",
    ]


def _head(label: str, about: str, kind: str) -> str:
    title = f' title="{escape(about)}"' if about else ""
    return f'<th scope="col"{_left(bool(kind))}{title}>{escape(label)}</th>'


def _line(
    row: Row, columns: tuple[Column, ...], groups: tuple[Group, ...], explorable: bool
) -> str:
    cells = [f'<th scope="row" class="t">{name(row.name)}</th>']
    if len(groups) > 1:
        cells.append(f'<td class="t">{escape(groups[row.group].label)}</td>')
    for column in columns:
        value = row.cells.get(column.key)
        text = cell_text(value, column.unit)
        inner = name(text) if isinstance(value, str) else escape(text)
        cells.append(f"<td{_left(column.unit is Unit.TEXT)}>{inner}</td>")
    cells += ["<td></td>"] if explorable else []
    return f"<tr>{''.join(cells)}</tr>"


def _left(is_text: bool) -> str:
    return ' class="t"' if is_text else ""


def _lists(page: Page) -> list[str]:
    if not page.lists:
        return []
    parts = ['<section aria-labelledby="rest-title">', '<h2 id="rest-title">Beside these</h2>']
    for one in page.lists:
        items = "".join(f"<li>{name(text)}</li>" for text in one.names)
        parts.append(
            f"<details><summary>{name(one.title)} ({len(one.names):,})</summary>"
            f'<ul class="names">{items}</ul></details>'
        )
    return [*parts, "</section>"]
