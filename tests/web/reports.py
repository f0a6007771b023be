"""The reports that are looked at, and what the tests of them have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.invoke import invoke
from tests.conftest import REPOSITORY
from tests.web import models
from tests.web.browsing import Visit

EXAMPLE = REPOSITORY / "examples" / "e2e"


def with_base(folder: Path, level: str) -> tuple[object, ...]:
    adapter, base = models.adapter_and_base(folder)
    return ("inspect", adapter, "--base", base, "--level", level)


COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "example": lambda _: ("inspect", EXAMPLE / "base", EXAMPLE / "tuned"),
    "values": lambda _: ("inspect", EXAMPLE / "base", EXAMPLE / "tuned", "--level", "values"),
    "headers": lambda _: ("inspect", EXAMPLE / "base", EXAMPLE / "tuned", "--level", "headers"),
    "checkpoint": lambda _: ("inspect", EXAMPLE / "base", "--level", "values"),
    "intruders": lambda _: ("inspect", EXAMPLE / "base", EXAMPLE / "tuned", "--intruders"),
    "many": lambda folder: ("inspect", *models.many_modules(folder)),
    "hostile": lambda folder: ("inspect", *models.hostile_pair(folder)),
    "adapter": lambda folder: ("inspect", *models.adapters(folder, 1)),
    "adapters": lambda folder: ("inspect", *models.adapters(folder, 3)),
    "compare": lambda folder: ("compare", *models.adapters(folder, 3)),
    "two": lambda folder: ("compare", *models.adapters(folder, 2)),
    "amplification": lambda folder: with_base(folder, "spectra"),
    "forecast": lambda folder: with_base(folder, "values"),
    "hostile-adapter": lambda folder: ("inspect", models.hostile_adapter(folder, "one")),
    "hostile-adapters": lambda folder: ("inspect", *models.hostile_adapters(folder)),
    "hostile-compare": lambda folder: ("compare", *models.hostile_adapters(folder)),
}
"""Name of a report → the command that makes it of files below a folder."""

EXPLORED = ("example", "many", "hostile", "adapter", "hostile-adapter")
"""Those in which a rank can be tried out."""


@dataclass(frozen=True)
class Report:
    """A page and the document of the same command."""

    page: Path
    document: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """A pair's tensors or an adapter's updates by name, as people count."""
        if self.document["what"] == "pair":
            found = self.document["changed"]
        else:
            found = [
                row | {"singular_values": row["values"], "delta_norm": row["norm"]}
                for row in self.document["updates"]
            ]
        return {row["name"]: row for row in sorted(found, key=_counted)}


def _counted(row: dict[str, Any]) -> list[str]:
    """The name with its numbers at one length."""
    return [part.zfill(9) if part.isdecimal() else part for part in re.split(r"(\d+)", row["name"])]


def make(name: str, folder: Path) -> Report:
    """Run the command of this name."""
    page = folder / "report.html"
    ended = invoke(*COMMANDS[name](folder / "models"), "--html", page, "--json")
    assert ended.code == 0, ended.err
    return Report(page, json.loads(ended.out))


Made = Callable[[str], Report]
Opened = Callable[..., Visit]


def ready(seen: Visit) -> Visit:
    """The page when its charts are drawn."""
    seen.page.wait_for_selector("body[data-ready]", timeout=60_000)
    return seen


def settled(seen: Visit) -> None:
    """When what was typed has been answered: the filter waits a little for more."""
    seen.page.wait_for_timeout(250)


def texts(seen: Visit, selector: str) -> list[str]:
    """What all matches hold, shown or not."""
    found: list[str] = seen.page.locator(selector).evaluate_all(
        "all => all.map(e => e.textContent)"
    )
    return found


def names_shown(seen: Visit) -> list[str]:
    """Of the table's rows that are not filtered away."""
    return texts(seen, "#rows tbody tr:not([hidden]) th")


def as_shown(name: str) -> str:
    """A name as the page shows it: what is unseen or steers, as an escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in name
    )


def show_all_rows(seen: Visit) -> None:
    """Long tables begin with a part of their rows."""
    more = seen.page.locator("#more")
    while more.is_visible():
        more.click()


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, from 0 to 1."""
    values = [int(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(values) / 765


def module_of(cell: Any) -> str:
    """The name of the module behind a cell of the map."""
    label: str = cell.get_attribute("aria-label")
    return label.rpartition(": ")[0]


def values_listed(seen: Visit) -> list[float]:
    """The singular values of the chosen module, as the page's own table lists them."""
    details = seen.page.locator("#curve-data")
    if details.get_attribute("open") is None:
        details.locator("summary").click()
    details.locator("tbody tr").first.wait_for()
    return [float(text) for text in texts(seen, "#curve-data tbody tr td:first-of-type")]


def check_module(seen: Visit, row: dict[str, Any]) -> None:
    """The module shown is this row of the document."""
    assert seen.page.locator("#module-title").inner_text() == row["name"]
    values = row["singular_values"]
    if values is None:
        assert not seen.page.locator("#curve-figure").is_visible()
        return
    assert values_listed(seen) == pytest.approx(values, rel=6e-3)  # small ones with three digits
    assert f"{len(values)} singular values" in seen.page.locator("#curve-words").inner_text()
