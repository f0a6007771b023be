"""Pictures: real PNG and SVG files, specifications that Vega-Lite's own schema accepts."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from loratool.errors import UsageError
from loratool.ops.inspect_adapter import AdapterReport
from loratool.ops.views.registry import page_of
from loratool.report.charts import page_charts
from loratool.report.drawing import png, svg
from loratool.report.figure import alt_text, figure
from tests.report.reports import MADE, report, update
from tests.report.test_html import hostile_report

DRAWN = [kind for kind in MADE if kind != "pair, headers"]
alt = pytest.importorskip("altair")


def is_valid(spec: dict[str, Any]) -> None:
    """Judged by the JSON schema that altair carries. Raises a validation error."""
    alt.Chart.from_dict(spec, validate=True)


@pytest.mark.parametrize("kind", DRAWN)
def test_specifications_are_valid(kind: str) -> None:
    page = page_of(report(kind))
    is_valid(figure(page))
    for spec in page_charts(page).values():
        is_valid(spec)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_png_of_sane_size(kind: str) -> None:
    data = png(figure(page_of(report(kind))))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 400 <= width <= 4000
    assert 150 <= height <= 4000
    assert len(data) < 1_000_000


def strings(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        if element.text and element.text.strip():
            yield element.text


@pytest.mark.parametrize("kind", [*DRAWN, "hostile"])
def test_an_svg_is_xml_without_references(kind: str) -> None:
    page = page_of(hostile_report() if kind == "hostile" else report(kind))
    root = ElementTree.fromstring(svg(figure(page)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    for element in root.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "image", "a", "foreignObject")
        for name, value in element.attrib.items():
            assert not name.rpartition("}")[2].startswith("on")
            assert "href" not in name
            assert "url(" not in value or value.startswith("url(#")
    words = " ".join(strings(root))
    assert page.title in words
    assert "\u202e" not in words


def test_the_map_shows_the_largest_of_each_place() -> None:
    page = page_of(report("pair"))
    (left, right) = figure(page)["hconcat"]
    shown = {(value["family"], value["layer"]): value["value"] for value in left["data"]["values"]}
    changed = {
        row["name"]: row["delta_norm"] / row["base_norm"]
        for row in report("pair").to_json()["changed"]
    }
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert shown["self_attn.q_proj", str(layer)] == changed[name]
    assert shown["mlp.up_proj", "1"] == 0.0  # it did not change
    top = max(value for (_, _), value in shown.items())
    assert left["encoding"]["color"]["scale"]["domain"] == [0, top]
    assert len({value["series"] for value in right["data"]["values"]}) <= 8


def test_of_several_in_one_place_the_largest_is_shown() -> None:
    rows = tuple(
        update(f"layers.{i % 2}.experts.{i}.q", (float(norm),))
        for i, norm in enumerate((1, 2, 7, 8, 3, 4))
    )
    spec = figure(page_of(AdapterReport("a", "PEFT", None, rows, (), (), 10, 20)))
    shown = {value["layer"]: value["value"] for value in spec["hconcat"][0]["data"]["values"]}
    assert shown == {"0": 7.0, "1": 8.0}


def test_adapters_share_one_scale() -> None:
    maps = figure(page_of(report("adapters")))["hconcat"][0]["vconcat"]
    assert [one["title"].startswith(letter) for one, letter in zip(maps, "AB", strict=True)]
    assert len({tuple(one["encoding"]["color"]["scale"]["domain"]) for one in maps}) == 1


def test_without_layers_there_are_bars() -> None:
    rows = tuple(update(f"part{i}", (float(i),)) for i in range(40))
    spec = figure(page_of(AdapterReport("a", "PEFT", None, rows, (), (), 10, 20)))
    bars = spec["hconcat"][0]
    assert bars["mark"]["type"] == "bar"
    assert bars["title"] == "the 24 largest of 40"
    assert [one["value"] for one in bars["data"]["values"][:2]] == [39.0, 38.0]


def test_headers_of_a_pair_have_nothing_to_draw() -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        figure(page_of(report("pair, headers")))


def test_words_for_those_who_do_not_see_it() -> None:
    assert alt_text(page_of(report("adapter"))) == (
        "Map of ‖ΔW‖ by layer and module, and singular values of the update on a logarithmic scale"
    )
    alone = AdapterReport("a", "PEFT", None, (update("q", (0.0,)),), (), (), 1, 2)
    assert alt_text(page_of(alone)) == "Bars: ‖ΔW‖ of the updates that have most"
    assert "script" not in alt_text(page_of(hostile_report()))
