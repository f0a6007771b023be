"""The budget rule against brute force and against uniform ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra import budget
from loratool.algebra.budget import allocate, parse_size
from loratool.algebra.spectrum import Spectrum


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Spectrum], int]:
    spectra = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 4))
        values = sorted(draw(st.lists(st.floats(0.1, 9), min_size=count, max_size=count)))[::-1]
        shape = (draw(st.integers(count, 9)), draw(st.integers(count, 9)))
        total = sum(v * v for v in values)
        spectra.append(Spectrum(torch.tensor(values, dtype=torch.float64), total, shape))
    return spectra, draw(st.integers(0, 80))


def gain(spectra: list[Spectrum], ranks: tuple[int, ...]) -> float:
    return sum(float(s.values[:r].square().sum()) for s, r in zip(spectra, ranks, strict=True))


def best(spectra: list[Spectrum], parameters: int) -> float:
    choices = itertools.product(*(range(len(s.values) + 1) for s in spectra))
    fitting = (
        c
        for c in choices
        if sum(r * sum(s.shape) for r, s in zip(c, spectra, strict=True)) <= parameters
    )
    return max(gain(spectra, c) for c in fitting)


@settings(deadline=None)
@given(problems())
def test_small_problems_are_solved_exactly(problem: tuple[list[Spectrum], int]) -> None:
    spectra, parameters = problem
    found = allocate(spectra, parameters)
    assert found.used <= parameters
    assert found.loss == 0
    assert gain(spectra, found.ranks) == pytest.approx(best(spectra, parameters), rel=1e-12)


@settings(deadline=None)
@given(problems())
def test_larger_ones_stay_within_their_stated_loss(problem: tuple[list[Spectrum], int]) -> None:
    spectra, parameters = problem
    before, budget.EXACT_WORK = budget.EXACT_WORK, 0
    try:
        found = allocate(spectra, parameters)
    finally:
        budget.EXACT_WORK = before
    assert found.used <= parameters
    assert gain(spectra, found.ranks) >= best(spectra, parameters) - found.loss - 1e-9


@settings(deadline=None)
@given(problems(), st.booleans(), st.booleans())
def test_no_uniform_rank_that_fits_is_better(
    problem: tuple[list[Spectrum], int], relative: bool, exactly: bool
) -> None:
    spectra, parameters = problem
    before = budget.EXACT_WORK
    budget.EXACT_WORK = before if exactly else 0
    try:
        found = allocate(spectra, parameters, relative=relative)
    finally:
        budget.EXACT_WORK = before

    def kept(ranks: tuple[int, ...]) -> float:
        return sum(
            float(s.values[:r].square().sum()) / (s.total_energy if relative else 1.0)
            for s, r in zip(spectra, ranks, strict=True)
        )

    for rank in range(10):
        uniform = tuple(min(rank, len(s.values)) for s in spectra)
        if sum(r * sum(s.shape) for r, s in zip(uniform, spectra, strict=True)) <= parameters:
            assert kept(found.ranks) >= kept(uniform) * (1 - 1e-12)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_never_worse_than_a_uniform_rank_of_the_same_size(share: float) -> None:
    generator = np.random.default_rng(3)
    spectra = []
    for _ in range(60):
        shape = tuple(int(x) for x in generator.choice([256, 512, 1024, 2816], 2))
        scale, power = generator.uniform(0.1, 3), generator.uniform(0.2, 1.5)
        values = scale * np.arange(1, 65) ** -power
        total = float((values**2).sum())
        spectra.append(Spectrum(torch.from_numpy(values), total, shape))
    every = sum(64 * sum(s.shape) for s in spectra)
    parameters = int(share * every)
    found = allocate(spectra, parameters)
    costs = sum(sum(s.shape) for s in spectra)
    uniform = tuple(parameters // costs for _ in spectra)
    assert found.used <= parameters
    assert gain(spectra, found.ranks) > gain(spectra, uniform)
    assert found.loss < 0.01 * gain(spectra, found.ranks)


def test_the_case_where_the_multiplier_alone_is_poor() -> None:
    """Costs 3 and 2, five parameters to spend: σ² {9} and {6.2, 6.1}."""
    first = Spectrum(torch.tensor([9.0]).double().sqrt(), 9.0, (2, 1))
    second = Spectrum(torch.tensor([6.2, 6.1]).double().sqrt(), 12.3, (1, 1))
    assert allocate([first, second], 5).ranks == (1, 1)


def test_relative_objective() -> None:
    loud = Spectrum(torch.tensor([100.0, 90.0]).double(), 18100.0, (5, 5))
    quiet = Spectrum(torch.tensor([1.0]).double(), 1.0, (5, 5))
    assert allocate([loud, quiet], 20).ranks == (2, 0)
    assert allocate([loud, quiet], 20, relative=True).ranks == (1, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("2%", 200),
        ("20MB", 10_000_000),
        ("1 MiB", 524_288),
        ("1.5kb", 750),
        ("x", None),
        ("-3", None),
        ("5 TB", None),
        ("0", None),
    ],
)
def test_sizes(text: str, expected: int | None) -> None:
    assert parse_size(text, bytes_per_value=2, base_values=10_000) == expected
