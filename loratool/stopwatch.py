"""How long the stages of a piece of work take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up wall seconds by stage. For one thread; stages do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @staticmethod
    def sum(parts: Iterable[Mapping[str, float]]) -> Stopwatch:
        """One that shows the sums of several others' seconds."""
        total = Stopwatch()
        for part in parts:
            for name, seconds in part.items():
                total.seconds[name] = total.seconds.get(name, 0.0) + seconds
        return total

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
