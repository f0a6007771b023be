"""What the functions take: paths, adapters with weights, a number of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from loratool.engine import Engine
from loratool.errors import UsageError

PathArg = str | PathLike[str]
Adapters = PathArg | Sequence[PathArg | tuple[PathArg, float]]
"""One path, or several, each alone or with a weight."""


def weighted(adapters: Adapters) -> list[tuple[Path, float]]:
    if isinstance(adapters, str | PathLike):
        return [(Path(adapters), 1.0)]
    return [
        (Path(one[0]), one[1]) if isinstance(one, tuple) else (Path(one), 1.0) for one in adapters
    ]


def several(patterns: Sequence[str]) -> tuple[str, ...]:
    """A string alone is one pattern, not one for each of its letters."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def paths_of(paths: PathArg | Sequence[PathArg]) -> list[Path]:
    """A path alone is one path."""
    return [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]


def engine_of(jobs: int | None) -> Engine:
    """Raises UsageError."""
    if jobs is None:
        return Engine()
    if jobs < 1:
        raise UsageError(f"jobs {jobs}: is not positive")
    return Engine(jobs)
