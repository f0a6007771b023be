"""Files of each system, shared by the tests of its commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.systems.rows import SYSTEMS, Row

Rows = Callable[[str], Row]


def _rows(factory: pytest.TempPathFactory, *, full_size: bool) -> Iterator[Rows]:
    made: dict[str, Row] = {}

    def row(name: str) -> Row:
        if name not in made:
            for other in list(made):  # the disk holds one system at a time
                shutil.rmtree(made.pop(other).folder)
            made[name] = Row(SYSTEMS[name], factory.mktemp(name), full_size=full_size)
        return made[name]

    yield row
    for left in made.values():
        shutil.rmtree(left.folder)


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """Systems of true names, a few columns wide."""
    yield from _rows(tmp_path_factory, full_size=False)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """Systems in their true shapes, float16."""
    yield from _rows(tmp_path_factory, full_size=True)
