"""The factoriser against full SVDs in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra.blocks import all_finite
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import factorize, leading_triplets, residual_norm, resolve_spectrum
from loratool.algebra.krylov import OVERSAMPLING
from loratool.algebra.lowrank import LowRank
from loratool.algebra.random import gaussian, uniform
from loratool.algebra.ranks import parse_rank_rule


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix whose singular values are ``values``."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return ((u * values) @ v.T).float()


def optimum(d: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(d.double())[rank:].square().sum().sqrt())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_small_matrices_are_optimal(rows: int, columns: int, rank: int, seed: int) -> None:
    d = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    factors = factorize(d, parse_rank_rule(str(rank)), key="t")
    assert factors.u.shape[1] == min(rank, rows, columns)
    missed = residual_norm(d, factors.low_rank())
    assert missed <= optimum(d, rank) * (1 + 1e-5) + 1e-5 * float(d.norm())


@pytest.mark.parametrize("shape", [(700, 900), (900, 700), (1300, 600)])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_randomised_method_is_near_the_optimum(
    shape: tuple[int, int], rank: int, power: float
) -> None:
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
    d = with_spectrum(*shape, values)
    factors = factorize(d, parse_rank_rule(str(rank)), key="t")
    assert factors.method == "block Krylov"
    best = optimum(d, rank)
    assert residual_norm(d, factors.low_rank()) / best - 1 < 1e-3
    exact = torch.linalg.svdvals(d.double())[:rank]
    assert torch.allclose(factors.spectrum.values[:rank], exact, rtol=5e-3)


@pytest.mark.parametrize("shape", [(700, 900), (900, 700), (40, 30)])
@pytest.mark.parametrize("scale", [1e-12, 1.0])
def test_triplets_without_a_certificate(shape: tuple[int, int], scale: float) -> None:
    """Near the optimum, orthonormal, values of the matrix as it is; of a small one, all it has."""
    values = scale / torch.arange(1, min(shape) + 1, dtype=torch.float64)
    d = with_spectrum(*shape, values)
    for rank in (8, 100):
        found = leading_triplets(d, rank, key="t")
        count = min(rank, *shape)
        assert (found.u.shape, found.v.shape) == ((shape[0], count), (shape[1], count))
        assert torch.allclose(found.values[:8], values[:8], rtol=1e-3)
        for vectors in (found.u.double(), found.v.double()):
            identity = torch.eye(count, dtype=torch.float64)
            assert torch.allclose(vectors.T @ vectors, identity, atol=1e-4)
        product = (found.u.double() * found.values) @ found.v.double().T
        missed = float((d.double() - product).norm())
        assert missed <= optimum(d, count) * (1 + 1e-3) + 1e-6 * float(d.double().norm())


def test_exact_flag_forbids_the_sketch() -> None:
    d = torch.randn(600, 640, generator=torch.Generator().manual_seed(0))
    factors = factorize(d, parse_rank_rule("8"), key="t", exact=True)
    assert factors.method.startswith("exact")
    assert residual_norm(d, factors.low_rank()) == pytest.approx(optimum(d, 8), rel=1e-6)


def test_rounding_is_not_stated_as_missed_where_few_rows_changed() -> None:
    """Whole blocks of rows hold nothing here; the others hold a LoRA."""
    generator = torch.Generator().manual_seed(0)
    b = torch.zeros(1500, 64)
    b[600:] = torch.randn(900, 64, generator=generator)
    value = LowRank(b, torch.randn(64, 256, generator=generator), 1 / 3)
    exact = value.scale * (value.b.double() @ value.a.double())
    d = exact.float()
    true = float((d.double() - exact).norm())
    assert residual_norm(d, value) == pytest.approx(true, rel=1e-6)


def test_full_rank_gives_the_matrix_back() -> None:
    d = with_spectrum(60, 90, torch.logspace(0, -11, 60, dtype=torch.float64))
    value = factorize(d, parse_rank_rule("full"), key="t").low_rank()
    assert residual_norm(d, value) <= 1e-6 * float(d.norm())


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("energy:0.9", lambda s, k: s[:k].sum() >= 0.9 * s.sum() > s[: k - 1].sum()),
        ("error:0.3", lambda s, k: s[k:].sum() <= 0.09 * s.sum() < s[k - 1 :].sum()),
    ],
)
@pytest.mark.parametrize("side", [80, 700])
def test_energy_rules_give_the_smallest_rank(rule: str, holds, side: int) -> None:  # type: ignore[no-untyped-def]
    values = 0.9 ** torch.arange(side, dtype=torch.float64)
    d = with_spectrum(side, side + 30, values)
    rank = factorize(d, parse_rank_rule(rule), key="t").u.shape[1]
    assert holds(values.square(), rank)


@pytest.mark.parametrize(("rule", "rank"), [("ratio:0.25", 3), ("absolute:0.2", 3)])
def test_threshold_rules(rule: str, rank: int) -> None:
    d = with_spectrum(50, 40, torch.tensor([1.0, 0.5, 0.26, 0.1, 0.05], dtype=torch.float64))
    assert factorize(d, parse_rank_rule(rule), key="t").u.shape[1] == rank


def test_signs_and_randomness_are_fixed() -> None:
    d = torch.randn(900, 800, generator=torch.Generator().manual_seed(5))
    rule = parse_rank_rule("4")
    one, two = (factorize(d, rule, key="layer") for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.v, two.v)
    assert bool((one.u.gather(0, one.u.abs().argmax(0, keepdim=True)) > 0).all())
    assert not torch.equal(gaussian(4, 4, "x"), gaussian(4, 4, "y"))


def test_norms_are_float64() -> None:
    d = torch.full((300, 1000), 1e-4)
    assert sum_of_squares(d) == pytest.approx(300_000 * float(d[0, 0].double()) ** 2, rel=1e-13)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), None])
def test_whether_all_is_finite(wrong: float | None) -> None:
    d = torch.tensor([[3e38, -3e38], [0.0, 1.0], [2.0, 4.0]])
    if wrong is not None:
        d[1, 0] = wrong
    for seen in (d, d.T):
        assert all_finite(seen) is (wrong is None)
    assert all_finite(torch.empty(0, 3))


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_matrices_of_lower_rank_than_the_sketch(rank: int, scale: float) -> None:
    values = scale * torch.linspace(2, 1, rank, dtype=torch.float64)
    d = with_spectrum(700, 620, values)
    factors = factorize(d, parse_rank_rule("24"), key="t")
    assert factors.method == "block Krylov"
    assert residual_norm(d, factors.low_rank()) <= 1e-5 * float(d.double().norm())
    assert bool(torch.isfinite(factors.u).all())
    assert bool(torch.isfinite(factors.v).all())
    spectrum = factors.spectrum.values
    assert torch.allclose(spectrum[:rank], values, rtol=1e-5)
    assert bool((spectrum[rank:] <= 1e-5 * values[0]).all())


def test_a_matrix_with_one_entry() -> None:
    d = torch.zeros(600, 900)
    d[5, 7] = 3.0
    factors = factorize(d, parse_rank_rule("4"), key="t")
    assert residual_norm(d, factors.low_rank()) <= 1e-5


@pytest.mark.parametrize("shape", [(900, 700), (700, 1400)])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 1.0, "noise"])
def test_every_value_of_a_spectrum_is_within_one_percent(
    decay: float | str, shape: tuple[int, int]
) -> None:
    """Of noise as well, where values lie so close that one pass misses them by 4 %."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    d = noise
    if isinstance(decay, float):
        u, _, vh = torch.linalg.svd(noise, full_matrices=False)
        d = (u * torch.arange(1, min(shape) + 1).pow(-decay)) @ vh
    true = torch.linalg.svdvals(d.double())
    found = resolve_spectrum(d, parse_rank_rule("32"), key="0:d").values
    assert ((found - true[:32]).abs() <= 0.01 * true[:32]).all()


@pytest.mark.parametrize("shape", [(900, 700), (600, 1400)])
@pytest.mark.parametrize("spectrum", ["i^-2", "i^-4", "2^-i", "one large", "three large", "rank 5"])
def test_values_far_below_the_largest_are_within_one_percent_too(
    spectrum: str, shape: tuple[int, int]
) -> None:
    """Steering in bf16 drowns them, so that one pass had 70 % too little of some."""
    count = min(shape)
    i = torch.arange(1, count + 1, dtype=torch.float64)
    values = {
        "i^-2": i.pow(-2),
        "i^-4": i.pow(-4),
        "2^-i": torch.exp2(-i),
        "one large": torch.where(i <= 1, 1e3, 1 / i),
        "three large": torch.where(i <= 3, 1.0, 1e-4 / i),
        "rank 5": torch.where(i <= 5, 1 / i, 0.0),
    }[spectrum]
    d = with_spectrum(*shape, values, seed=3)
    true = torch.linalg.svdvals(d.double())[:32]
    found = resolve_spectrum(d, parse_rank_rule("32"), key="0:d").values
    assert ((found - true).abs() <= 0.01 * true + 1e-5 * true[0]).all()


@pytest.mark.parametrize("larger", [1, 8, 20])
@pytest.mark.parametrize("factor", [1.03, 1.06])
def test_values_little_above_many_equal_ones_are_within_one_percent_too(
    larger: int, factor: float
) -> None:
    """Pairs that mix both kinds have small residuals: some values were 3 % too small."""
    i = torch.arange(1, 801, dtype=torch.float64)
    d = with_spectrum(900, 800, torch.where(i <= larger, factor, 1.0).double(), seed=2)
    true = torch.linalg.svdvals(d.double())[:32]
    found = resolve_spectrum(d, parse_rank_rule("32"), key="0:d").values
    assert ((found - true).abs() <= 0.01 * true).all()


@pytest.mark.parametrize("key", ["a", "b", "c"])
def test_a_change_of_two_rows_against_each_other(key: str) -> None:
    """Whichever two rows they are, a sketch sees their difference: one by signs did not."""
    count = 1 + OVERSAMPLING
    start = uniform(600, count, key).sign()
    one, other = (start @ start.T == count).fill_diagonal_(False).nonzero()[0].tolist()
    generator = torch.Generator().manual_seed(1)
    d = torch.zeros(600, 600)
    d[:, 300:] = 0.003 * torch.randn(600, 300, generator=generator)
    row = torch.zeros(600)
    row[:300] = torch.randn(300, generator=generator)
    d[one], d[other] = row / row.norm(), -row / row.norm()
    factors = factorize(d, parse_rank_rule("1"), key=key)
    assert factors.method == "block Krylov"
    assert residual_norm(d, factors.low_rank()) <= optimum(d, 1) * (1 + 1e-3)


@pytest.mark.parametrize("shape", [(1024, 1024), (768, 2048)])
def test_flat_noise_far_below_the_largest_is_found_as_well(shape: tuple[int, int]) -> None:
    """What a 16-bit float rounds away from the steering covers it: 0.7 % were missed, and 1.5 %
    of a weaker one."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(shape, generator=generator)
    noise /= torch.linalg.matrix_norm(noise, 2)
    u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator)).Q for n in shape)
    for level in (0.002, 0.001):
        d = u @ v.T + level * noise
        squares = torch.linalg.svdvals(d.double()).square()
        best = float(squares[64:].sum().sqrt())
        factors = factorize(d, parse_rank_rule("64"), key="k", sketch_dtype=torch.bfloat16)
        assert factors.method == "block Krylov"
        assert residual_norm(d, factors.low_rank()) <= 1.005 * best
