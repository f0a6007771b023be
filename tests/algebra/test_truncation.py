"""Sums of updates and their cuts, against dense float64 matrices."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankLimits, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.truncation import (
    rounding,
    stored_error,
    total,
    truncate,
    wanted_rank,
)
from loratool.errors import ShapeMismatch
from tests.algebra.test_lowrank import low_ranks


def everything(spectrum: Spectrum) -> int:
    return len(spectrum.values)


@st.composite
def families(draw: st.DrawFn) -> list[LowRank]:
    first = draw(low_ranks())
    return [first, *draw(st.lists(low_ranks(first.shape), max_size=3))]


@given(families())
def test_the_total_is_the_sum(values: list[LowRank]) -> None:
    dense = torch.stack([value.dense() for value in values]).sum(0)
    size = sum(float(value.dense().norm()) for value in values)
    assert float((total(values).dense() - dense).norm()) <= 1e-13 * size


@given(families())
def test_nothing_is_lost_at_full_rank(values: list[LowRank]) -> None:
    exact = total(values)
    cut = truncate(exact, everything)
    size = sum(float(value.dense().norm()) for value in values)
    assert float((cut.value.dense() - exact.dense()).norm()) <= 1e-12 * size
    assert cut.value.rank <= min(exact.shape)


@given(low_ranks(), st.integers(-99, 99), st.integers(-99, 99))
def test_weights_are_linear(value: LowRank, one: int, two: int) -> None:
    parts = truncate(total([value * one, value * two]), everything).value.dense()
    expected = (one + two) * value.dense()
    size = (abs(one) + abs(two)) * float(value.dense().norm())
    assert float((parts - expected).norm()) <= 1e-12 * size


@given(low_ranks(), st.integers(1, 3), st.floats(0.1, 30))
def test_an_update_minus_itself_is_nothing(value: LowRank, copies: int, weight: float) -> None:
    terms = [value * weight] * copies + [value * (-weight * copies)]
    assert truncate(total(terms), everything).value.rank == 0


def test_the_numerical_rank_is_that_of_the_sum() -> None:
    shared, own = torch.randn(200, 3), torch.randn(200, 2)
    a = torch.randn(5, 100)
    one = LowRank(torch.cat([shared, own], dim=1), a, 1e-4)
    cut = truncate(total([one, LowRank(shared * -1, a[:3], 1e-4)]), everything)
    assert cut.value.rank == 2


def test_components_of_very_different_sizes_are_all_seen() -> None:
    b, a = torch.randn(50, 3).double(), torch.randn(3, 40).double()
    lopsided = LowRank(b * torch.tensor([1e8, 1.0, 1e-8]), a * torch.tensor([[1e-8], [1.0], [1e8]]))
    assert truncate(lopsided, everything).value.rank == 3


@given(low_ranks(), st.integers(1, 8))
def test_a_cut_is_optimal_and_balanced(value: LowRank, rank: int) -> None:
    cut = truncate(value, lambda _: rank)
    u, s, vh = torch.linalg.svd(value.dense())
    best = (u[:, : min(rank, len(s))] * s[:rank]) @ vh[: min(rank, len(s))]
    missed, least = (float((value.dense() - m).norm()) for m in (cut.value.dense(), best))
    assert missed == pytest.approx(least, rel=1e-6, abs=1e-9 * float(s[0]))
    lengths = cut.value.b.norm(dim=0), cut.value.a.norm(dim=1)
    assert torch.allclose(*lengths, rtol=1e-9)
    top = cut.value.b.abs().argmax(dim=0, keepdim=True)
    assert bool((cut.value.b.gather(0, top) > 0).all())


@given(families(), st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_a_stored_cut_misses(values: list[LowRank], rank: int, dtype: torch.dtype) -> None:
    """Against the norm of the dense difference, with a residual that is only rounding as well."""
    exact = total(values)
    cut = truncate(exact, lambda _: rank)
    stored = LowRank(cut.value.b.to(dtype), cut.value.a.to(dtype))
    expected = float((exact.dense() - stored.dense()).norm())
    found = stored_error(exact, cut, rounding(cut.value, stored))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-13 * float(exact.dense().norm()))


def test_what_rounding_alone_does() -> None:
    one = LowRank(torch.randn(30, 4).double(), torch.randn(4, 20).double(), 2.0)
    two = LowRank(one.b.bfloat16(), one.a.bfloat16(), 2.0)
    expected = float((one.dense() - two.dense()).norm())
    assert rounding(one, two).norm() == pytest.approx(expected, rel=1e-12)
    assert rounding(two, two).norm() == 0


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="cannot add"):
        total(
            [
                LowRank(torch.ones(2, 1), torch.ones(1, 3)),
                LowRank(torch.ones(3, 1), torch.ones(1, 2)),
            ]
        )


SPECTRUM = Spectrum(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64), 21.25, (40, 30))


@pytest.mark.parametrize(
    ("rule", "limits", "rank"),
    [
        ("2", RankLimits(), 2),
        ("9", RankLimits(), 9),
        ("99", RankLimits(), 30),
        ("9", RankLimits(most=6), 6),
        ("full", RankLimits(), 4),
        ("full", RankLimits(most=3), 3),
        ("full", RankLimits(multiple=8), 8),
        ("energy:0.9", RankLimits(), 2),
        ("energy:1", RankLimits(), 4),
        ("energy:0.9", RankLimits(least=3), 3),
        ("error:0", RankLimits(), 4),
        ("ratio:0.5", RankLimits(), 2),
        ("absolute:9", RankLimits(), 0),
        ("auto", RankLimits(), 4),
        ("nuclear:1", RankLimits(), 4),
        ("effective", RankLimits(), 4),
        ("gavish-donoho", RankLimits(), 4),
        ("gavish-donoho", RankLimits(most=2), 2),
    ],
)
def test_what_a_rule_wants_of_a_low_rank_matrix(rule: str, limits: RankLimits, rank: int) -> None:
    """The values past the last are zero, and no rule counts them."""
    assert wanted_rank(parse_rank_rule(rule, limits), SPECTRUM) == rank


@pytest.mark.parametrize("rule", ["energy:0.7", "error:0.3", "quantile:0.8", "stable", "knee"])
def test_a_rule_wants_what_it_would_of_the_dense_matrix(rule: str) -> None:
    value = LowRank(torch.randn(24, 6).double(), torch.randn(6, 20).double())
    parsed = parse_rank_rule(rule)
    found = truncate(value, partial(wanted_rank, parsed)).value.rank
    dense = torch.linalg.svdvals(value.dense())
    complete = Spectrum(dense[:6], float(dense.square().sum()), (6, 6))
    assert found == parsed(complete)
    assert math.isfinite(found)
