"""The table of all modules: its figures, sorting, filtering and choosing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.browsing import Visit
from tests.web.reports import (
    Made,
    Opened,
    check_module,
    module_of,
    names_shown,
    ready,
    settled,
    show_all_rows,
    texts,
)

pytestmark = pytest.mark.web


def heading(seen: Visit, label: str) -> Any:
    return seen.page.locator("#rows thead").get_by_role("button", name=label, exact=True)


@pytest.mark.parametrize("name", ["example", "many"])
def test_it_holds_the_figures(name: str, made: Made, opened: Opened) -> None:
    seen = opened(made(name).page, scripts=False)
    labels = texts(seen, "#rows thead th")
    table = seen.page.locator("#rows tbody tr").all_text_contents()
    cells = iter(texts(seen, "#rows tbody th, #rows tbody td"))
    assert len(table) == len(made(name).rows)
    for row in made(name).rows.values():
        line = {label: next(cells) for label in labels}
        assert line["module"] == row["name"]
        change = row["delta_norm"] / row["base_norm"]
        assert float(line["change"].removesuffix(" %")) / 100 == pytest.approx(change, abs=6e-5)
        assert float(line["‖W − W0‖"]) == pytest.approx(row["delta_norm"], rel=1e-3)
        assert line["shape"] == "×".join(map(str, row["shape"]))
        if row["stable_rank"] is None:
            assert line["stable rank"] == ""
        else:
            assert float(line["stable rank"]) == pytest.approx(row["stable_rank"], rel=1e-3)


@pytest.mark.parametrize("name", ["example", "many"])
def test_it_sorts(name: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made(name).page))
    rows = made(name).rows
    by_change = sorted(rows, key=lambda one: -rows[one]["delta_norm"] / rows[one]["base_norm"])
    for direction, expected in (("descending", by_change), ("ascending", by_change[::-1])):
        heading(seen, "change").click()
        names = names_shown(seen)
        assert names == expected[: len(names)]
        assert seen.page.locator(f"#rows th[aria-sort={direction}]").count() == 1
        assert seen.page.locator("#rows th[aria-sort]").count() == 1
    seen.check_quiet()


def test_rows_without_a_value_sort_last(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    rows = made("example").rows
    known = sum(row["stable_rank"] is not None for row in rows.values())
    for sign in (-1, 1):
        heading(seen, "stable rank").press("Enter")
        ranks = [rows[name]["stable_rank"] for name in names_shown(seen)]
        assert ranks[:known] == sorted(ranks[:known], key=lambda rank: sign * rank)
        assert ranks[known:] == [None] * (len(ranks) - known)


def test_it_filters(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("many").page))
    names = list(made("many").rows)
    for text in ("part_19", "LAYERS.7.", "no such", ""):
        seen.page.locator("#filter").fill(text)
        settled(seen)
        fitting = [name for name in names if text.lower() in name.lower()]
        found = names_shown(seen)
        assert found == fitting[: len(found)]
        assert len(found) == len(fitting) or seen.page.locator("#more").is_visible()
        count = f"{len(fitting):,} of 2,000" if text else "2,000"
        assert count in seen.page.locator("#count").inner_text()
    show_all_rows(seen)
    assert sorted(names_shown(seen)) == sorted(names)
    heading(seen, "change").click()
    seen.page.locator("#filter").fill("part_3")
    settled(seen)
    assert sorted(names_shown(seen)) == sorted(name for name in names if "part_3" in name)
    seen.check_quiet()


def test_a_row_can_be_chosen_before_and_after_sorting(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("example").page))
    rows = made("example").rows
    for _ in range(2):
        for name in list(rows)[::9]:
            seen.page.locator("#rows").get_by_role("button", name=name, exact=True).click()
            check_module(seen, rows[name])
            current = seen.page.locator("#rows tr[aria-current] th")
            assert current.all_text_contents() == [name]
        heading(seen, "change").click()


@pytest.mark.parametrize("name", ["adapters", "compare"])
def test_adapters_and_pairs_can_be_chosen(name: str, made: Made, opened: Opened) -> None:
    seen = ready(opened(made(name).page))
    options = texts(seen, "#group option")
    assert len(options) == 3
    labels = set()
    for index, option in enumerate(options):
        seen.page.locator("#group").select_option(index=index)
        labels.add(seen.page.locator("#map button").first.get_attribute("aria-label"))
        assert option.partition(":")[0] in seen.page.locator("#module-place").inner_text()
    assert len(labels) == 3
    seen.check_quiet()


def test_the_comparison_shows_the_cosines(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("compare").page))
    modules = {row["name"]: row for row in made("compare").document["modules"]}
    for index, letters in enumerate(("A B", "A C", "B C")):
        seen.page.locator("#group").select_option(index=index)
        assert letters in seen.page.locator("#group option:checked").inner_text()
        for cell in seen.page.locator("#map button").all():
            assert "cosine" in cell.get_attribute("aria-label")
            expected = modules[module_of(cell)]["pairs"][index]["cosine"]
            assert float(cell.inner_text()) == pytest.approx(expected, abs=6e-4)
    seen.check_quiet()


def test_adapters_side_by_side_show_each_ones_norm(made: Made, opened: Opened) -> None:
    seen = ready(opened(made("adapters").page))
    seen.page.locator("#rows tbody button").first.click()
    name = seen.page.locator("#module-title").inner_text()
    line = texts(seen, "#module-facts tbody tr:first-child td")
    norms = [
        next(row["norm"] for row in adapter["updates"] if row["name"] == name)
        for adapter in made("adapters").document["adapters"]
    ]
    assert [float(cell) for cell in line] == pytest.approx(norms, rel=1e-3)
