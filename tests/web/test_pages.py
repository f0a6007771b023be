"""What every report must be in a real browser: quiet, accessible, fit for any window and paper."""

from __future__ import annotations

import pytest

from tests.web.browsing import NARROW, WIDE
from tests.web.reports import COMMANDS, Made, Opened, luminance, ready, settled

pytestmark = pytest.mark.web

every_report = pytest.mark.parametrize("name", COMMANDS)


@every_report
def test_it_opens_without_complaint_and_asks_for_nothing(
    name: str, made: Made, opened: Opened
) -> None:
    seen = ready(opened(made(name).page))
    settled(seen)
    seen.check_quiet()
    assert seen.page.locator("h1").inner_text() != ""
    for chart in seen.page.locator(".chart").all():
        assert chart.locator("svg path").count() > 0


@every_report
def test_no_serious_fault_of_accessibility(name: str, made: Made, opened: Opened) -> None:
    """In light and dark, with all that is folded open, wide and narrow."""
    seen = ready(opened(made(name).page))
    for summary in seen.page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    looks = (("light", WIDE), ("dark", WIDE), ("dark", NARROW))
    for scheme, width in looks[1:2] if name == "many" else looks:  # axe takes long on 2,000 cells
        seen.page.emulate_media(color_scheme=scheme)
        seen.page.set_viewport_size({"width": width, "height": 900})
        assert seen.faults() == [], scheme


@every_report
def test_it_never_scrolls_sideways(name: str, made: Made, opened: Opened) -> None:
    """However wide the window was when the charts were drawn."""
    seen = ready(opened(made(name).page))
    for width in (WIDE, 768, NARROW, 320):
        seen.page.set_viewport_size({"width": width, "height": 900})
        settled(seen)
        assert seen.overflow() == [], width
    seen = ready(opened(made(name).page, width=NARROW))
    assert seen.overflow() == []
    seen.check_quiet()


def test_it_follows_light_and_dark(made: Made, opened: Opened) -> None:
    wanted = (
        "getComputedStyle(document.documentElement).backgroundColor",
        "getComputedStyle(document.body).color",
        "getComputedStyle(document.querySelector('#curve svg path[stroke]')).stroke",
        "getComputedStyle(document.querySelector('#map button')).backgroundColor",
    )
    seen = ready(opened(made("example").page))
    colours = {}
    for scheme in ("light", "dark"):
        seen.page.emulate_media(color_scheme=scheme)
        settled(seen)
        colours[scheme] = [seen.page.evaluate(what) for what in wanted]
    assert luminance(colours["light"][0]) > 0.9 > 0.3 > luminance(colours["light"][1])
    assert luminance(colours["dark"][0]) < 0.2 < 0.7 < luminance(colours["dark"][1])
    assert all(light != dark for light, dark in zip(*colours.values(), strict=True))


CLIPPED = """[...document.querySelectorAll('.scroll')].filter(
    box => box.offsetParent && box.scrollHeight > box.clientHeight + 1
).map(box => box.id || box.className)"""


@pytest.mark.parametrize("name", ["example", "compare", "hostile"])
def test_on_paper_it_is_dark_on_light_and_whole(name: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made(name).page, scheme="dark", media="print", width=794))
    background = "getComputedStyle(document.documentElement).backgroundColor"
    assert luminance(seen.page.evaluate(background)) == 1.0
    assert luminance(seen.page.evaluate("getComputedStyle(document.body).color")) == 0.0
    assert seen.overflow() == []
    assert not seen.page.locator("#filter").is_visible()
    assert seen.page.locator("#rows tbody tr").last.is_visible()
    assert seen.page.evaluate(CLIPPED) == []
    assert seen.page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["example", "many", "hostile"])
def test_without_scripts_the_table_is_there(name: str, made: Made, opened: Opened) -> None:
    seen = opened(made(name).page, scripts=False)
    rows = seen.page.locator("#rows tbody tr")
    assert rows.count() == len(made(name).rows)
    assert rows.last.is_visible()


def test_a_page_is_of_moderate_size(made: Made) -> None:
    assert made("example").page.stat().st_size < 1.5e6
    assert made("many").page.stat().st_size < 4e6
