"""What the functions take: paths, adapters with weights, a number of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from loratool.engine import Engine

PathArg = str | PathLike[str]
Adapters = PathArg | Sequence[PathArg | tuple[PathArg, float]]
"""One path, or several, each alone or with a weight."""


def weighted(adapters: Adapters) -> list[tuple[Path, float]]:
    if isinstance(adapters, str | PathLike):
        return [(Path(adapters), 1.0)]
    return [
        (Path(one[0]), one[1]) if isinstance(one, tuple) else (Path(one), 1.0) for one in adapters
    ]


def engine_of(jobs: int | None) -> Engine:
    return Engine() if jobs is None else Engine(jobs)
