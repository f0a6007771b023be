"""The simplex finds minima, within its trials and its box, and does so again."""

from __future__ import annotations

import math

import pytest

from loratool.algebra.search import Point, nelder_mead


def bowl(point: Point) -> float:
    """Lowest at (0.3, -0.7, 0.1)."""
    x, y, z = point
    return (x - 0.3) ** 2 + 3 * (y + 0.7) ** 2 + (z - 0.1 + 0.5 * (x - 0.3)) ** 2


def test_a_bowl() -> None:
    best, value = nelder_mead(bowl, (1.0, 1.0, 1.0), step=0.5, bound=1.5, trials=200)
    assert best == pytest.approx((0.3, -0.7, 0.1), abs=1e-2)
    assert value == pytest.approx(bowl(best))


@pytest.mark.parametrize("trials", [1, 2, 7, 30])
def test_trials_are_counted_and_points_tried_once(trials: int) -> None:
    tried: list[Point] = []

    def function(point: Point) -> float:
        tried.append(point)
        return bowl(point)

    best, value = nelder_mead(function, (1.0, 1.0, 1.0), step=0.5, bound=1.5, trials=trials)
    assert len(tried) == len(set(tried)) == trials
    assert value == min(map(bowl, tried)) == bowl(best)


def test_the_box_holds() -> None:
    """Where the minimum lies outside, and where the start lies on the edge."""
    tried: list[Point] = []

    def function(point: Point) -> float:
        tried.append(point)
        return -point[0] + point[1]

    best, _ = nelder_mead(function, (1.5, 0.0), step=0.5, bound=1.5, trials=100)
    assert all(abs(value) <= 1.5 for point in tried for value in point)
    assert best == pytest.approx((1.5, -1.5), abs=1e-3)


def test_the_same_answers_lead_to_the_same_trials() -> None:
    runs: list[list[Point]] = []
    for _ in range(2):
        tried: list[Point] = []

        def function(point: Point, tried: list[Point] = tried) -> float:
            tried.append(point)
            return bowl(point)

        nelder_mead(function, (1.0, 1.0, 1.0), step=0.5, bound=2, trials=50)
        runs.append(tried)
    assert runs[0] == runs[1]


def test_infinite_values_are_walked_away_from() -> None:
    best, value = nelder_mead(
        lambda p: math.inf if p[0] > 0.9 else (p[0] - 0.2) ** 2,
        (1.0,),
        step=-0.5,
        bound=1.5,
        trials=60,
    )
    assert best[0] == pytest.approx(0.2, abs=0.02)
    assert math.isfinite(value)
