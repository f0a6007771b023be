"""Names that come from files and would steer a page: they are shown, and do nothing."""

from __future__ import annotations

import pytest

from tests.web import models
from tests.web.reports import Made, Opened, as_shown, names_shown, ready, settled, texts

pytestmark = pytest.mark.web


@pytest.mark.parametrize("name", ["hostile", "hostile-adapter"])
def test_every_hostile_name_is_shown_and_can_be_chosen(
    name: str, made: Made, opened: Opened
) -> None:
    seen = ready(opened(made(name).page))
    names = [as_shown(name) for name in made(name).rows]
    assert len(names) == 3 * len(models.HOSTILE)
    assert texts(seen, "#rows tbody th") == names
    for index, expected in enumerate(names):
        seen.page.locator("#rows tbody tr").nth(index).locator("button").click()
        assert texts(seen, "#module-title") == [expected]
    seen.check_quiet()


@pytest.mark.parametrize(
    "name", ["hostile", "hostile-adapter", "hostile-adapters", "hostile-compare"]
)
def test_touching_everything_runs_nothing(name: str, made: Made, opened: Opened) -> None:
    """Every control hovered over, focused and clicked, every choice made, every fold opened."""
    seen = ready(opened(made(name).page))
    for choice in seen.page.locator("select").all():
        for value in choice.locator("option").evaluate_all("all => all.map(e => e.value)"):
            choice.select_option(value)
    for summary in seen.page.locator("summary").all():
        if summary.is_visible():
            summary.click()
    seen.page.evaluate(
        """for (const one of document.querySelectorAll('body :not(a)'))
            for (const kind of ['mouseover', 'mouseenter', 'focus', 'click'])
                one.dispatchEvent(new MouseEvent(kind, {bubbles: true}));"""
    )
    settled(seen)
    seen.check_quiet()


def test_hostile_names_can_be_looked_for(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("hostile").page))
    for text in map(as_shown, models.HOSTILE):
        seen.page.locator("#filter").fill(text)
        settled(seen)
        found = names_shown(seen)
        assert len(found) >= 3
        assert all(text.lower() in name.lower() for name in found)
    seen.check_quiet()


def test_no_element_was_made_of_a_name(made: Made, opened: Opened) -> None:
    """Seen from the document itself, whatever policy keeps scripts from running."""
    for name in ("hostile", "hostile-adapter", "hostile-adapters", "hostile-compare"):
        page = opened(made(name).page).page
        assert (
            page.locator("img, iframe, object, embed, [onerror], [onfocus], [autofocus]").count()
            == 0
        )
        assert page.locator("b:not(output b)").count() == 0
        assert page.locator("script").count() == 3
