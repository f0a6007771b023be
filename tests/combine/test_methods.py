"""Every method against its formula, written independently in ``reference``."""

from __future__ import annotations

from typing import Any

import pytest

from loratool.combine.registry import METHODS
from tests.combine import reference
from tests.combine.values import close, run, three

WEIGHTS = [0.7, 0.3, 1.2]

CASES: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}),
    ("svd", {}),
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"lambda": 0.4}),
    ("ties", {}),
    ("ties", {"density": 0.5, "normalize": False, "lambda": 2.0}),
    ("ties", {"majority": "frequency"}),
    ("ties", {"density": 1.0}),
]


@pytest.mark.parametrize(("name", "given"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("shape", [(40, 24), (1, 7), (600, 1000)], ids=str)
def test_a_method_is_its_formula(name: str, given: dict[str, Any], shape: tuple[int, int]) -> None:
    values = three(*shape)
    formula = getattr(reference, name, reference.plain_sum)
    expected = formula([value.dense() for value in values], WEIGHTS, **given)
    assert close(run(name, values, WEIGHTS, **given), expected)


def test_every_method_has_a_case() -> None:
    assert {name for name, _ in CASES} >= set(METHODS)
