"""Every method against its formula, written independently in ``reference``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratool.algebra.lowrank import LowRank
from loratool.combining.registry import METHODS, find_method
from loratool.errors import DisagreementError, UsageError
from tests.combining import reference, reference_spectral
from tests.combining.values import close, low_rank, run, three

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
    ("dare_linear", {}),
    ("dare_linear", {"density": 0.1, "lambda": 2.0}),
    ("dare_ties", {"density": 0.3}),
    ("dare_ties", {"normalize": True, "majority": "frequency"}),
    ("della", {}),
    ("della", {"density": 0.3, "epsilon": 0.25, "lambda": 0.5}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.2}),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.2}),
    ("magnitude_prune", {}),
    ("magnitude_prune", {"density": 0.05, "lambda": 3.0}),
    ("sce", {}),
    ("sce", {"density": 0.2}),
    ("slerp", {}),
    ("slerp", {"t": 0.2}),
    ("nuslerp", {}),
    ("multislerp", {}),
    ("multislerp", {"normalize": False}),
    ("karcher", {}),
    ("karcher", {"max_iter": 1}),
    ("model_stock", {}),
    ("nearswap", {}),
    ("nearswap", {"t": 0.5}),
]


def inputs(name: str, shape: tuple[int, int]) -> tuple[list[LowRank], list[float]]:
    """As many updates as the method takes, up to three; related ones, for the methods on angles."""
    most = find_method(name).adapters[1] or 3
    values = three(*shape)
    shared = low_rank(*shape, 2, 9)
    mixed = [torch.cat([v.b, shared.b], dim=1) for v in values]
    related = [
        LowRank(b, torch.cat([v.a, shared.a]), v.scale) for b, v in zip(mixed, values, strict=True)
    ]
    return related[:most], WEIGHTS[:most]


@pytest.mark.parametrize(("name", "given"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("shape", [(40, 24), (3, 7), (300, 200)], ids=str)
def test_a_method_is_its_formula(name: str, given: dict[str, Any], shape: tuple[int, int]) -> None:
    values, weights = inputs(name, shape)
    formula = getattr(reference, name, reference.plain_sum)
    expected = formula([value.dense() for value in values], weights, **given)
    assert close(run(name, values, weights, **given), expected)


def test_every_method_has_a_case() -> None:
    assert {name for name, _ in CASES + reference_spectral.CASES} >= set(METHODS)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, m in METHODS.items()
        if m.adapters[0] == 1 and n not in reference_spectral.FLATTENING
    ],
)
def test_one_update_at_weight_one_is_itself(name: str) -> None:
    """With the parameters that drop nothing, for the methods that drop something."""
    value = low_rank(20, 30, 3, 5, 0.7)
    known = {parameter.name for parameter in find_method(name).parameters}
    given = {"density": 1.0} if "density" in known else {}
    assert close(run(name, [value], [1.0], **given), value.dense())


@pytest.mark.parametrize("name", ["svd", "cat", "linear", "ties", "magnitude_prune", "sce"])
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_order_does_not_matter(name: str, order: tuple[int, ...]) -> None:
    values = three()
    shuffled = [values[i] for i in order]
    expected = run(name, values, WEIGHTS)
    assert close(run(name, shuffled, [WEIGHTS[i] for i in order]), expected)


@pytest.mark.parametrize("name", ["karcher", "multislerp", "model_stock"])
def test_means_of_directions_do_not_depend_on_order(name: str) -> None:
    values, _ = inputs(name, (30, 20))
    assert close(run(name, values, [1, 2, 3]), run(name, values[::-1], [3, 2, 1]), 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_update_of_nothing(name: str) -> None:
    """An adapter without an update for a weight counts as zero, and nothing becomes NaN."""
    value = low_rank(20, 30, 3, 5)
    nothing = LowRank(torch.zeros(20, 0), torch.zeros(0, 30))
    zero = value * 0.0
    one, two = run(name, [value, nothing], [1.0, 1.0]), run(name, [value, zero], [1.0, 1.0])
    assert bool(torch.isfinite(one).all())
    assert close(one, two) or float(one.norm()) == float(two.norm()) == 0
    assert float(run(name, [nothing, nothing], [1.0, 1.0]).norm()) == 0


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.space == "dense"])
def test_blocks_of_rows_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = inputs(name, (64, 48))
    expected = run(name, values, weights)
    monkeypatch.setattr("loratool.algebra.row_blocks.BLOCK_ELEMENTS", 5 * 48)
    assert close(run(name, values, weights), expected, 1e-6)


def test_random_masks_follow_the_seed() -> None:
    first, again, other = (run("dare_linear", three(), WEIGHTS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not close(first, other, 0.1)


def test_equal_updates_do_not_share_a_mask() -> None:
    value = low_rank(40, 30, 2, 1)
    once = run("dare_linear", [value], [1.0]) != 0
    both = run("dare_linear", [value, value], [1.0, 1.0]) != 0
    assert 0.4 < float(once.double().mean()) < 0.6
    assert 0.65 < float(both.double().mean()) < 0.85


@pytest.mark.parametrize("name", ["linear", "nuslerp", "multislerp", "karcher"])
def test_weights_that_cancel_are_refused(name: str) -> None:
    with pytest.raises(DisagreementError, match="add up to zero"):
        run(name, three()[:2], [1.0, -1.0])


def test_directions_that_cancel_are_refused() -> None:
    value = low_rank(10, 10, 2, 1)
    with pytest.raises(DisagreementError, match="cancel"):
        run("multislerp", [value, value * -1.0, value * 0.0], [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "adapters", "given", "message"),
    [
        ("svd", 2, {"density": 0.5}, "takes no density"),
        ("ties", 2, {"density": 0}, "needs a number above 0 up to 1"),
        ("ties", 2, {"density": float("nan")}, "needs a number"),
        ("ties", 2, {"majority": "loudest"}, "needs total or frequency"),
        ("ties", 2, {"normalize": 1}, "needs true or false"),
        ("karcher", 2, {"max_iter": 2.5}, "needs a whole number"),
        ("della", 2, {"density": 0.9}, "must lie between 0 and 1"),
        ("slerp", 3, {}, "combines exactly 2 adapters, not 3"),
        ("model_stock", 1, {}, "combines at least 2 adapters, not 1"),
    ],
)
def test_parameters_are_checked(
    name: str, adapters: int, given: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_method(name).check(given, adapters)
