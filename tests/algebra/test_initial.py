"""The test for a common initial A: how sure it is, and what it must not be fooled by."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from loratool.algebra.initial import (
    SURE,
    RowStatistics,
    Start,
    at_least,
    judge_start,
    row_statistics,
)


def start(seed: int, modules: int = 6, rank: int = 8, width: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rank, width, generator=generator) for _ in range(modules)]


def verdict(first: list[Tensor], second: list[Tensor]) -> Start | None:
    found = judge_start([row_statistics(a, b) for a, b in zip(first, second, strict=True)])
    return found.start if found else None


def test_same_start_with_drift() -> None:
    one, two = start(1), start(1)
    drifted = [a + 0.5 * torch.randn_like(a) for a in two]
    assert verdict(one, drifted) is Start.SHARED


@pytest.mark.parametrize("seed", range(20))
def test_independent_starts(seed: int) -> None:
    assert verdict(start(2 * seed), start(2 * seed + 1)) is Start.INDEPENDENT


def test_common_training_from_independent_starts_is_no_common_start() -> None:
    """Both learn the same directions, mixed in their own way, more than they began with."""
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(3, 64, generator=generator) for _ in range(6)]
    one, two = (
        [
            a + 2 * torch.randn(8, 3, generator=generator) @ g
            for a, g in zip(start(s), directions, strict=True)
        ]
        for s in (1, 2)
    )
    assert verdict(one, two) in (Start.INDEPENDENT, Start.UNDECIDED)


def test_factors_of_decompositions_say_nothing() -> None:
    """The same matrix decomposed twice with slightly other values: equal A, no training at all."""
    factors = []
    for noise in (0.0, 0.01):
        generator = torch.Generator().manual_seed(3)
        part = []
        for _ in range(6):
            delta = torch.randn(64, 8, generator=generator) @ torch.randn(
                8, 64, generator=generator
            )
            delta += noise * torch.randn(64, 64)
            _, s, vh = torch.linalg.svd(delta, full_matrices=False)
            vh = vh * torch.sign(vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)))
            part.append(s[:8, None].sqrt() * vh[:8])
        factors.append(part)
    assert verdict(*factors) is Start.ORTHOGONALISED


def test_too_few_rows_decide_nothing() -> None:
    one = start(1, modules=1, rank=4)
    assert verdict(one, one) is Start.UNDECIDED


def test_single_rows_may_come_from_a_decomposition() -> None:
    one = start(1, modules=40, rank=1)
    assert verdict(one, one) is Start.UNDECIDED
    assert verdict(one, start(2, modules=40, rank=1)) is Start.INDEPENDENT


def test_nothing_to_compare() -> None:
    assert judge_start([]) is None
    zero = torch.zeros(2, 4)
    assert judge_start([row_statistics(zero, zero)]) is None


def test_the_cosine_and_the_distance() -> None:
    a = torch.randn(4, 9)
    statistics = row_statistics(a, a + 0.1 * torch.randn(4, 9))
    found = judge_start([statistics])
    assert found is not None
    assert found.cosine == pytest.approx(statistics.cosine)
    assert found.distance == pytest.approx(math.sqrt(2 - 2 * found.cosine))
    assert isinstance(statistics, RowStatistics)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (5, 10), (10, 10), (300, 512), (1000, 1000)])
def test_binomial_tail(k: int, n: int) -> None:
    exact = Fraction(sum(math.comb(n, i) for i in range(k, n + 1)), 2**n)
    assert at_least(k, n) == pytest.approx(float(exact), rel=1e-9)


def test_false_claims_are_as_rare_as_stated() -> None:
    """The sign test alone, at a level that can be seen: 5 % of independent pairs, no more."""
    hits = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 16, 32, generator=generator)
        statistics = row_statistics(a, b)
        hits += at_least(statistics.positive, statistics.rows) <= 0.05
    assert hits <= 400 * 0.05 + 4 * math.sqrt(400 * 0.05 * 0.95)
    assert SURE < 1e-3
