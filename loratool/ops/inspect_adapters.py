"""Several adapters side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.engine import Engine, Progress
from loratool.errors import UsageError
from loratool.ops.inspect_adapter import AdapterReport, describe_adapter
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.sources import open_adapters
from loratool.provenance import document

_ENVELOPE = ("schema", "command", "version")


@dataclass(frozen=True)
class AdaptersReport:
    """One report per adapter, in the order they were named in."""

    level: Level
    adapters: tuple[AdapterReport, ...]

    def to_json(self) -> dict[str, Any]:
        bodies = [
            {name: value for name, value in report.to_json().items() if name not in _ENVELOPE}
            for report in self.adapters
        ]
        body = {"what": "adapters", "level": str(self.level), "adapters": bodies}
        return document("inspect", SCHEMA_VERSION, body)


def inspect_adapters(
    paths: Sequence[Path],
    level: Level = Level.SPECTRA,
    *,
    only: Sequence[str] = (),
    alpha: float | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AdaptersReport:
    """What ``inspect_adapter`` tells, of two or more; each is named by the last part of its path,
    or by the path as given where two end alike.

    Raises InputError, UsageError, and NothingMatches for a pattern that fits nothing in one of
    them.
    """
    if len(paths) < 2:
        raise UsageError("side by side takes at least two adapters")
    reports = [
        replace(
            describe_adapter(path, adapter, level, only=only, engine=engine, progress=progress),
            name=name,
        )
        for path, name, adapter in zip(
            paths, _names(paths), open_adapters(paths, alpha), strict=True
        )
    ]
    return AdaptersReport(level, tuple(reports))


def _names(paths: Sequence[Path]) -> list[str]:
    ends = [path.resolve().name for path in paths]
    return [
        str(path) if ends.count(end) > 1 else end for path, end in zip(paths, ends, strict=True)
    ]
