"""The map and the module that it leads to, by mouse and by keyboard."""

from __future__ import annotations

import numpy as np
import pytest

from tests.web.reports import Made, Opened, check_module, luminance, module_of, ready, settled

pytestmark = pytest.mark.web

FOCUSED = "document.activeElement.getAttribute('aria-label') ?? ''"


def module_focused(page: object) -> str:
    label: str = page.evaluate(FOCUSED)  # type: ignore[attr-defined]
    return label.rpartition(": ")[0]


@pytest.mark.parametrize("name", ["example", "many"])
def test_a_click_shows_that_modules_spectrum(name: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made(name).page))
    rows = made(name).rows
    cells = seen.page.locator("#map button")
    count = cells.count()
    assert count == sum(row["layer"] is not None for row in rows.values())
    for index in np.linspace(0, count - 1, 9).astype(int):
        cell = cells.nth(int(index))
        cell.click()
        check_module(seen, rows[module_of(cell)])
        assert cell.get_attribute("aria-pressed") == "true"
        assert seen.page.locator("#map [aria-pressed=true]").count() == 1
        assert module_of(cell) in seen.page.locator("#said").inner_text()
    seen.check_quiet()


def test_what_is_in_no_layer_can_be_chosen(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    rows = made("example").rows
    chips = seen.page.locator("#outside button").all()
    assert {module_of(chip) for chip in chips} == {
        name for name, row in rows.items() if row["layer"] is None
    }
    for chip in chips:
        chip.click()
        check_module(seen, rows[module_of(chip)])


def test_the_chart_follows_the_choice(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    drawn = set()
    for module in ("h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.3.mlp.c_proj.weight"):
        seen.page.locator(f"#map button[aria-label^='transformer.{module}:']").click()
        settled(seen)
        lines = seen.page.locator("#curve svg path[stroke]").evaluate_all(
            "all => all.map(e => e.getAttribute('d')).sort((a, b) => b.length - a.length)"
        )
        values = made("example").rows[f"transformer.{module}"]["singular_values"]
        assert lines[0].count("L") == sum(value > 0 for value in values) - 1
        drawn.add(lines[0])
    assert len(drawn) == 3


@pytest.mark.parametrize("name", ["example", "many"])
def test_by_keyboard(name: str, made: Made, opened: Opened) -> None:
    """One stop for Tab; arrows move, Enter and space choose."""
    seen = ready(opened(made(name).page))
    rows = made(name).rows
    page, press = seen.page, seen.page.keyboard.press
    assert page.locator("#map button[tabindex='0']").count() == 1
    page.locator("#metric").focus()
    for _ in range(6):
        press("Tab")
        if page.evaluate("document.activeElement.closest('#map td') !== null"):
            break
    for key in ("ArrowUp", "ArrowLeft"):
        for _ in range(101):
            press(key)
    corner = module_of(page.locator("#map button").first)
    assert module_focused(page) == corner
    reached = []
    for move, choose in (("ArrowRight", "Enter"), ("ArrowDown", "Space"), ("ArrowLeft", "Enter")):
        press(move)
        reached.append(module_focused(page))
        press(choose)
        check_module(seen, rows[reached[-1]])
        page.locator(f"#map button[aria-label^='{reached[-1]}:']").focus()
    first, second, third = (rows[one] for one in reached)
    assert first["layer"] == second["layer"] == rows[corner]["layer"] + 1
    assert third["layer"] == rows[corner]["layer"]
    assert len({*reached, corner}) == 4
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    seen.check_quiet()


def test_every_control_is_reached_by_tab_and_none_keeps_the_focus(
    made: Made, opened: Opened
) -> None:
    seen = ready(opened(made("example").page))
    stops = seen.page.evaluate(
        """[...document.querySelectorAll('a[href], button, input, select, summary, [tabindex]')]
        .filter(e => e.checkVisibility() && e.tabIndex >= 0 && e.type !== 'radio')
        .map((e, index) => { e.dataset.stop = index; return index; })"""
    )
    reached = []
    for _ in range(len(stops) + 5):
        seen.page.keyboard.press("Tab")
        reached.append(seen.page.evaluate("document.activeElement.dataset.stop"))
    assert {int(stop) for stop in reached if stop is not None} == set(stops)


def test_coloured_by_another_figure(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    rows = made("example").rows
    seen.page.locator("#metric").select_option(label="stable rank")
    known = 0
    for cell in seen.page.locator("#map button").all():
        name, _, text = cell.get_attribute("aria-label").rpartition(": stable rank ")
        value = rows[name]["stable_rank"]
        assert text == "not known" if value is None else float(text) == pytest.approx(value, 1e-3)
        known += value is not None
    assert known == 16
    seen.check_quiet()


def test_the_darkest_cell_is_the_largest(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    colours = {}
    for cell in seen.page.locator("#map button").all():
        row = made("example").rows[module_of(cell)]
        colour = cell.evaluate("e => getComputedStyle(e).backgroundColor")
        colours[row["delta_norm"] / row["base_norm"]] = luminance(colour)
    ordered = [colours[change] for change in sorted(colours)]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(ordered)) > 4


@pytest.mark.parametrize("name", ["example", "forecast"])
def test_the_scale_is_written_as_the_cells_are(name: str, made: Made, opened: Opened) -> None:
    """The script writes the one, the document holds the other; both tiny and plain shares."""
    seen = ready(opened(made(name).page))
    most = seen.page.locator("#map [aria-pressed=true]").inner_text()
    assert most.endswith(" %")
    assert most in seen.page.locator("#legend").inner_text()


def test_the_whole_map_of_few_layers_is_seen_at_any_width(made: Made, opened: Opened) -> None:
    """Figures stand in its cells where they fit."""
    seen = ready(opened(made("example").page))
    first = seen.page.locator("#map button").first
    assert first.inner_text().endswith(" %")
    for width, figures in ((360, False), (1280, True)):
        seen.page.set_viewport_size({"width": width, "height": 900})
        settled(seen)
        beyond = "place => place.scrollWidth - place.clientWidth"
        assert seen.page.locator("#map").evaluate(beyond) <= 0
        assert first.inner_text().endswith(" %") == figures


def test_only_what_did_not_change_is_palest(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("many").page))
    assert seen.page.locator("#map button").count() > 1000
    assert seen.page.locator("#map button.q0").count() == 0
