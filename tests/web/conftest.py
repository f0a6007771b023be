"""Chromium, and the pages it opens.

Needs a Chromium or Chrome that is installed already: named by LORATOOL_CHROMIUM, or found on the
PATH. On Debian: apt-get install chromium.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.web.browsing import Visit, visit
from tests.web.reports import Made, Opened, Report, make

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Its path; skips where there is none."""
    named = os.environ.get("LORATOOL_CHROMIUM")
    if named is not None:
        assert Path(named).is_file(), f"LORATOOL_CHROMIUM={named}: no such file"
        return named
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH; see CONTRIBUTING.md")
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs the extra web")
    path = chromium()
    with api.sync_playwright() as playwright:
        # as root, Chromium starts only without its sandbox
        browser = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A report by its name in ``reports.COMMANDS``, made when it is first asked for."""
    reports: dict[str, Report] = {}

    def one(name: str) -> Report:
        if name not in reports:
            reports[name] = make(name, tmp_path_factory.mktemp(name))
        return reports[name]

    return one


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """Opens a file, as ``visit`` does; all are closed at the end."""
    with ExitStack() as stack:

        def open_one(path: Path, **options: Any) -> Visit:
            return stack.enter_context(visit(browser, path, **options))

        yield open_one
