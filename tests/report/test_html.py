"""The page: complete in itself, inert whatever names it holds, and saying what --json says."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loratool as lt
from loratool.api import look
from loratool.ops.compare_report import CompareReport
from loratool.ops.inspect import AdaptersReport
from loratool.ops.inspect_adapter import AdapterReport
from loratool.ops.intruders import IntruderReport
from loratool.ops.views.registry import VIEWS, Viewable, page_of
from loratool.report.html import render_page
from loratool.report.text import embedded, plain, size_text
from tests.ops.builders import LLAMA, llama_like, save_folder
from tests.report.reading import Element, data_of, read, table_of
from tests.report.reports import MADE, report, rows_of, update

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"onmouseover="alert(1)',
    "' onfocus='alert(1)",
    "model.layers.0.\u202egnp.weight",
    "model.layers.1.<img src=x onerror=alert(1)>.weight",
    "line\u2028separator\u2029and\x00nul\x1b[31m",
    "lone\ud800surrogate",
    "x" * 3000,
    "model.layers.1." + "y" * 500,
    "a&b&lt;c&#60;",
    "עברית.layers.0.שלום",
    "${alert(1)}{{x}}`",
    "model.layers.999999999999999999999999.q",
    "model.layers." + "9" * 5000 + ".q",
)


def hostile_report() -> AdapterReport:
    rows = tuple(update(name, (2.0, 2.0, 1.0)) for name in HOSTILE)
    others = tuple({"name": name, "shape": [1], "update": name} for name in HOSTILE)
    return AdapterReport(
        "</title><script>alert(2)</script>", "PEFT", HOSTILE[2], rows, others, others, 10, 20
    )


def page(kind: str) -> Element:
    return read(render_page(page_of(report(kind))))


def test_every_report_of_inspect_and_compare_has_a_page() -> None:
    reports = {*get_args(look.InspectReport), AdaptersReport, CompareReport, IntruderReport}
    assert reports == set(VIEWS) == set(get_args(Viewable))
    assert {type(report(kind)) for kind in MADE} == reports


@pytest.mark.parametrize("kind", [*MADE, "hostile"])
def test_it_needs_nothing_else(kind: str) -> None:
    shown = hostile_report() if kind == "hostile" else report(kind)
    root = read(render_page(page_of(shown)))
    for element in root.walk():
        for name, value in element.attributes.items():
            assert name not in ("src", "srcset", "action", "style"), element
            assert not name.startswith("on"), element
            if name == "href":
                assert value is not None
                assert value.startswith("#") or value == "data:,"
        assert element.tag not in ("iframe", "object", "embed", "img", "base", "form")
    (style,) = root.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    scripts = root.all("script")
    assert [one.attributes.get("type") for one in scripts] == ["application/json", None, None]
    (policy,) = [
        one.attributes["content"]
        for one in root.all("meta")
        if one.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    hashes = [hashlib.sha256(one.text.encode()).digest() for one in scripts[1:]]
    assert allowed == [base64.b64encode(digest).decode() for digest in hashes]
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe" not in policy


@pytest.mark.parametrize("kind", MADE)
def test_its_table_has_the_reports_rows(kind: str) -> None:
    root, rows = page(kind), rows_of(report(kind).to_json())
    table, data = table_of(root), data_of(root)
    assert [cells[0] for cells in table] == [row["name"] for row in rows] == data["names"]
    heads = root.by_id("rows").all("thead")[0].all("th")
    assert {len(cells) for cells in table} == {len(heads)}
    assert len({head.text for head in heads}) == len(heads)


@pytest.mark.parametrize("kind", MADE)
def test_its_figures_are_those_of_json(kind: str) -> None:
    """Every column that the document has under the same name, and what follows from others."""
    data, document = data_of(page(kind)), report(kind).to_json()
    rows = rows_of(document)
    known = {
        "change": lambda row: row["delta_norm"] / row["base_norm"],
        "energy_share": lambda row: (row["delta_norm"] / document["delta_norm"]) ** 2,
        "rank_0.9": lambda row: row["rank_for"]["0.9"],
        "rank_0.95": lambda row: row["rank_for"]["0.95"],
        "rank_0.99": lambda row: row["rank_for"]["0.99"],
        "lost_BF16": lambda row: row["lost_share"]["BF16"],
        "lost_F16": lambda row: row["lost_share"]["F16"],
        "swallowed_BF16": lambda row: row["swallowed_share"]["BF16"],
        "swallowed_F16": lambda row: row["swallowed_share"]["F16"],
        "relative": lambda row: (row.get("delta_norm") or row["update_norm"]) / row["base_norm"],
        "phi_left": lambda row: last(row["phi_left"]),
        "phi_right": lambda row: last(row["phi_right"]),
        "first_in_second": lambda row: row["common_energy"][0],
        "second_in_first": lambda row: row["common_energy"][1],
        "examined": lambda row: len(row["directions"]),
        "least_cosine": lambda row: min(one["cosine"] for one in row["directions"]),
        "joint_rank": lambda row: next(
            one["joint"]["rank_for"] for one in document["modules"] if one["name"] == row["name"]
        ),
    }
    assert data["cells"]
    for key, cells in data["cells"].items():
        expected = [known[key](row) if key in known else row[key] for row in rows]
        assert [value is None for value in cells] == [value is None for value in expected], key
        numbers = [value for value in expected if value is not None]
        found = [value for value in cells if value is not None]
        assert found == pytest.approx(numbers, rel=1e-12), key


def last(grid: Any) -> Any:
    """φ of the whole spaces, where the document has a grid of it."""
    return grid["values"][-1][-1] if isinstance(grid, dict) else grid


def test_its_curves_are_the_spectra() -> None:
    for kind, field in (
        ("pair", "singular_values"),
        ("checkpoint, spectra", "singular_values"),
        ("adapter", "values"),
        ("adapters", "values"),
    ):
        data, rows = data_of(page(kind)), rows_of(report(kind).to_json())
        drawn = [curves[0]["values"] if curves else None for curves in data["curves"]]
        assert any(drawn)
        for values, row in zip(drawn, rows, strict=True):
            assert values == (pytest.approx(row[field], rel=1e-7) if row[field] else None)
    cosines = [
        [one["cosine"] for one in row["directions"]]
        for row in report("intruders").to_json()["weights"]
    ]
    drawn = [curves[0]["values"] for curves in data_of(page("intruders"))["curves"]]
    assert [pytest.approx(values, rel=1e-7) for values in cosines] == drawn
    energies = [
        curves[0]["energy"] if curves else None for curves in data_of(page("pair"))["curves"]
    ]
    for energy, row in zip(energies, report("pair").to_json()["changed"], strict=True):
        if energy is not None:
            assert energy == pytest.approx(row["delta_norm"] ** 2)


def test_what_was_measured_stands_in_the_overview() -> None:
    root, document = page("pair"), report("pair").to_json()
    overview = root.all("section")[0].text
    assert f"{len(document['changed'])} of {len(document['tensors'])}" in overview
    assert document["lora"] in overview
    for note in document["notes"]:
        assert note in overview
    assert document["unchanged"]
    for name in document["unchanged"]:
        assert name in root.text
    written = {cell.text for cell in root.all("td")}
    assert any("MiB" in text or "KiB" in text for text in written)


def test_costs_stand_in_the_overview(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    costly = lt.inspect(base, cost=(2, 8))
    overview = read(render_page(page_of(costly))).all("section")[0]
    table = overview.all("table")[1]
    cells = [[cell.text for cell in row.children] for row in table.all("tbody")[0].all("tr")]
    stated = costly.to_json()["cost"]["ranks"]
    assert [line[0] for line in cells] == ["2", "8"]
    assert [line[1] for line in cells] == [f"{row['parameters']:,}" for row in stated]
    assert [line[2] for line in cells] == [size_text(row["adapter_bytes"]) for row in stated]
    assert [line[7] for line in cells] == [f"~{row['extract']['seconds']:.2g} s" for row in stated]


def test_cells_are_written_as_they_are() -> None:
    table, data = table_of(page("pair")), data_of(page("pair"))
    keys = [column["key"] for column in data["columns"]]
    for cells, change in zip(table, data["cells"]["change"], strict=True):
        assert float(cells[1 + keys.index("change")].removesuffix(" %")) == pytest.approx(
            100 * change, abs=0.005
        )


def test_hostile_names_stay_text() -> None:
    text = render_page(page_of(hostile_report()))
    root = read(text)
    assert len(root.all("script")) == 3
    assert not root.all("img")
    assert root.all("h1")[0].text == "</title><script>alert(2)</script>"
    shown = data_of(root)["names"]
    assert [cells[0] for cells in table_of(root)] == shown
    assert sorted(shown) == sorted(plain(name) for name in HOSTILE)
    for char in ("\u202e", "\u2028", "\u2029", "\x00", "\x1b", "\ud800"):
        assert char not in text
    text.encode("utf-8")
    assert all(cell.children and cell.children[0].tag == "bdi" for cell in rows_headings(root))


def rows_headings(root: Element) -> list[Element]:
    (body,) = root.by_id("rows").all("tbody")
    return body.all("th")


@given(st.text() | st.lists(st.text() | st.floats(allow_nan=False, allow_infinity=False)))
def test_embedded_json_is_inert_and_the_same(value: Any) -> None:
    text = embedded(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


@given(st.text())
def test_plain_text_keeps_letters_and_nothing_that_steers(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_numbers_that_are_none_are_words() -> None:
    """JSON has no NaN, and the page's script would not start."""
    checkpoint = report("checkpoint, values")
    first = checkpoint.values[0]
    health = replace(first.health, rms=math.nan, largest=math.inf)
    broken = replace(checkpoint, values=(replace(first, health=health), *checkpoint.values[1:]))
    root = read(render_page(page_of(broken)))
    assert data_of(root)["cells"]["rms"][0] == "nan"
    assert "nan" in table_of(root)[0]


def test_more_values_than_a_page_can_hold_are_cut_and_counted() -> None:
    values = tuple(float(1000 - i) for i in range(1000))
    rows = tuple(
        update(f"model.layers.{i}.q.weight", values, (2000, 2000), energy=4e8) for i in range(500)
    )
    large = AdapterReport("a", "PEFT", None, rows, (), (), 10, 20)
    curves = data_of(read(render_page(page_of(large))))["curves"]
    assert {(len(one[0]["values"]), one[0]["held"]) for one in curves} == {(400, 1000)}
    assert curves[0][0]["energy"] == 4e8


def test_a_map_that_nobody_could_look_at_is_not_asked_for() -> None:
    rows = tuple(update(f"a{i}.layers.{i}.q", (1.0,)) for i in range(500))
    many = page_of(AdapterReport("a", "PEFT", None, rows, (), (), 10, 20))
    assert not many.has_map
    assert data_of(read(render_page(many)))["hasMap"] is False
    assert page_of(report("adapter")).has_map


def test_more_rows_than_a_browser_likes_are_left_out_and_said() -> None:
    rows = tuple(
        update(f"layers.{i % 100}.experts.{i}.q", (float(i % 9973),)) for i in range(10_500)
    )
    shown = page_of(AdapterReport("a", "PEFT", None, rows, (), (), 10, 20)).limited(10_000)
    assert len(shown.rows) == 10_000
    assert shown.notes[0] == (
        "this page holds 10,000 of 10,500 updates, those with the largest ‖ΔW‖, and sums up no "
        "others; --csv and --json have all"
    )
    kept = {row.name for row in shown.rows}
    least = min(row.cells["norm"] for row in shown.rows)  # type: ignore[type-var]
    assert all(row.norm is not None and row.norm <= least for row in rows if row.name not in kept)
    assert page_of(report("pair")).limited(10_000) == page_of(report("pair"))


def test_rows_of_several_say_whose_they_are() -> None:
    for kind, labels in (("adapters", {"A", "B"}), ("compare three", {"A B", "A C", "B C"})):
        root = page(kind)
        assert {cells[1] for cells in table_of(root)} == labels == set(data_of(root)["letters"])
