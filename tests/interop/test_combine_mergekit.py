"""The dense rules and the spherical means against mergekit's own code.

mergekit does not install beside this package's dependencies, so what it gives was written down by
``tests/combining/data/make_mergekit.py``, with the version in the file's header. Where it differs
on purpose, docs/combine.md lists how.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from loratool.algebra.lowrank import LowRank
from tests.combining import mergekit_cases
from tests.combining.mergekit_cases import CASES, Case
from tests.combining.values import close, run

FILE = Path(__file__).parents[1] / "combining" / "data" / mergekit_cases.FILE


def values(count: int) -> list[LowRank]:
    return [LowRank(b, a) for b, a in mergekit_cases.factors()[:count]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_method_is_mergekits(case: Case) -> None:
    with safe_open(FILE, "pt") as file:
        expected = file.get_tensor(case.name).double()
    found = run(case.ours, values(len(case.weights)), list(case.weights), **case.options)
    assert float(expected.norm()) > 0
    assert close(found, expected, 1e-6)


def test_della_drops_what_mergekit_drops() -> None:
    """What is kept is then divided by its chance, as the paper has it; mergekit leaves it, or
    rescales all of an update to its former sum of magnitudes."""
    with safe_open(FILE, "pt") as file:
        expected = file.get_tensor("della_mask").bool()
    found = run("della", values(1), [1.0], density=0.5, epsilon=0.25)
    assert bool(((found != 0) == expected).all())
