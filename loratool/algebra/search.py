"""Minimising a function of a few numbers that is known only by trying it.

The simplex of Nelder and Mead (1965) with their coefficients, kept inside a box by clipping. No
randomness: the same answers lead to the same trials, so an interrupted search can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

Point = tuple[float, ...]


class _Spent(Exception):
    """The last trial was used up."""


def nelder_mead(
    function: Callable[[Point], float],
    start: Sequence[float],
    *,
    step: float,
    bound: float,
    trials: int,
) -> tuple[Point, float]:
    """The best point of at most ``trials`` calls, and its value.

    start: the first point tried. step: how far the first simplex reaches along each axis. bound:
    every coordinate stays within ±bound. Points tried before are not tried again.
    """
    known: dict[Point, float] = {}

    def at(values: Sequence[float]) -> tuple[float, Point]:
        point = tuple(round(min(max(value, -bound), bound), 6) for value in values)
        if point not in known:
            if len(known) >= trials:
                raise _Spent
            known[point] = function(point)
        return known[point], point

    with suppress(_Spent):
        _descend(at, start, step, bound)
    best = min(known, key=lambda point: known[point])
    return best, known[best]


def _descend(
    at: Callable[[Sequence[float]], tuple[float, Point]],
    start: Sequence[float],
    step: float,
    bound: float,
) -> None:
    size = len(start)
    simplex = [at(start)]
    for axis in range(size):
        moved = list(start)
        moved[axis] += -step if moved[axis] + step > bound else step
        simplex.append(at(moved))
    while max(abs(a - b) for _, p in simplex for a, b in zip(p, simplex[0][1], strict=True)) > 1e-4:
        simplex.sort()
        worst = simplex[-1]
        centre = [sum(p[axis] for _, p in simplex[:-1]) / size for axis in range(size)]

        def along(factor: float, centre: list[float] = centre, worst: Point = worst[1]) -> Point:
            return tuple(c + factor * (w - c) for c, w in zip(centre, worst, strict=True))

        reflected = at(along(-1.0))
        if reflected < simplex[0]:
            simplex[-1] = min(reflected, at(along(-2.0)))
        elif reflected < simplex[-2]:
            simplex[-1] = reflected
        else:
            contracted = at(along(-0.5 if reflected < worst else 0.5))
            if contracted < min(reflected, worst):
                simplex[-1] = contracted
            else:
                best = simplex[0][1]
                simplex[1:] = [
                    at([(a + b) / 2 for a, b in zip(p, best, strict=True)]) for _, p in simplex[1:]
                ]
