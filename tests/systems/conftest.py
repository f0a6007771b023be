"""Files of each system, shared by the tests of its commands."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.systems.rows import SYSTEMS, Row

Rows = Callable[[str], Row]
Turn = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def large_files(tmp_path_factory: pytest.TempPathFactory) -> Turn:
    """Entered by one test process at a time: the disk need not hold two large systems at once."""
    lock = tmp_path_factory.getbasetemp().parent / "large-files.lock"

    @contextmanager
    def turn() -> Iterator[None]:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return turn


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rows]:
    """Systems of true names, a few columns wide."""
    yield from _rows(tmp_path_factory, full_size=False)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory, large_files: Turn) -> Iterator[Rows]:
    """Systems in their true shapes, float16."""
    with large_files():
        yield from _rows(tmp_path_factory, full_size=True)


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
