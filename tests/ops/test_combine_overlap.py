"""What a plain sum repeats, against whole matrices; and when it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.ops.combine_overlap import overlap_of
from tests.ops.adapters import adapter, updates


def flat(path: Path) -> torch.Tensor:
    """All updates of an adapter on MODULES as one vector."""
    found = updates(path)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def test_cosines_and_reach_are_those_of_the_whole_updates(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / name, 4, 3 * i) for i, name in enumerate("abc")]
    weights = [0.5, -2.0, 1.0]
    rules = ["layers.0=0.5"]
    report = lt.combine(paths, tmp_path / "out", weights=weights, weight_rules=rules).to_json()
    vectors = torch.stack([flat(path) for path in paths])
    lt.combine(paths, tmp_path / "cat", weights=weights, weight_rules=rules, method="cat")
    added, energy = flat(tmp_path / "cat"), vectors.square().sum(1)
    units = vectors / energy.sqrt()[:, None]
    found = torch.tensor(report["overlap"]["cosines"], dtype=torch.float64)
    assert torch.allclose(found, units @ units.T, atol=1e-9)
    assert report["overlap"]["reach"] == pytest.approx((vectors @ added / energy).tolist(), 1e-5)


def test_a_sum_that_repeats_is_said(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / name, 4, 0) for name in "ab"]  # one adapter, twice

    def notes(weights: list[float], method: str = "svd", **given: object) -> list[str]:
        out = tmp_path / "out"
        report = lt.combine(paths, out, weights=weights, method=method, overwrite=True, **given)
        return [note for note in report.notes if "repeats it" in note]

    (note,) = notes([1.0, 1.0])
    assert "cosines up to 1.00" in note
    assert "contains what a does 2.00 times" in note
    assert str(tmp_path) not in note
    assert notes([1.0, 1.0], "cat")
    assert not notes([0.5, 0.5])
    assert not notes([1.0, -0.5])
    assert not notes([1.0, 1.0], "linear")
    assert not notes([1.0, 1.0], "ties")
    for method in ("task_arithmetic", "dare_linear", "dare_ties", "core_breadcrumbs"):
        assert notes([1.0, 1.0], method)
    assert not notes([1.0, 1.0], "task_arithmetic", lambda_=0.5)
    assert notes([1.0, 1.0], "ties", normalize=False)


def test_a_weight_above_one_alone_is_what_was_asked_for(tmp_path: Path) -> None:
    report = lt.combine([adapter(tmp_path / "a")], tmp_path / "out", weights=[3.0])
    assert not report.notes


def test_an_adapter_that_changes_nothing() -> None:
    products = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    overlap = overlap_of([products], [(1.0, 1.0)])
    assert overlap.reach == overlap.own == (1.0, None)
    assert overlap.notes(["a", "b"]) == []


def test_a_large_adapter_beside_a_small_one_is_no_repetition() -> None:
    """At right angles but for 0.02: the small one is touched, but nothing is shared."""
    products = torch.tensor([[1.0, 2.0], [2.0, 10000.0]], dtype=torch.float64)
    overlap = overlap_of([products], [(1.0, 1.0)])
    assert overlap.reach == pytest.approx((3.0, 1.0002))
    assert overlap.notes(["a", "b"]) == []
