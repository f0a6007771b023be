"""What the documentation shows, works."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratool
from loratool.cli.main import main
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [
        text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language
    ]


@pytest.fixture
def playground(
    tmp_path: Path, example_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder with base/ and tuned/, as the pages assume."""
    for name in ("base", "tuned"):
        shutil.copytree(example_pair / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name
)
def test_python_runs(page: Path, playground: Path) -> None:
    namespace: dict[str, object] = {}
    for text in blocks(page, "python"):
        exec(compile(text, page.name, "exec"), namespace)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "console")], ids=lambda page: page.name
)
def test_commands_run(page: Path, playground: Path) -> None:
    for text in blocks(page, "console"):
        for line in text.splitlines():
            if line.startswith("$ loratool "):
                with pytest.raises(SystemExit) as ended:
                    main(line.removeprefix("$ loratool ").split())
                assert ended.value.code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents() -> None:
    linked = re.findall(r"\]\((docs/[^)#:]+)\)", PAGES[0].read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(linked)


def test_public_names_are_documented() -> None:
    text = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    for name in loratool.__all__:
        assert name in text, name
        assert getattr(loratool, name).__doc__
