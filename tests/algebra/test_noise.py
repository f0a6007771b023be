"""The noise floor, and the question whether a change was a LoRA's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra.differences import DifferenceSums
from loratool.algebra.factorize import factorize, resolve_spectrum
from loratool.algebra.lora_test import LoraAnswer, lora_rank
from loratool.algebra.noise import BIASED, NoiseFloor, ulp
from loratool.algebra.ranks import parse_rank_rule
from loratool.algebra.spectrum import Spectrum

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def noise_floor(stored: torch.Tensor) -> NoiseFloor:
    """The floor that the rounding of a matrix sets."""
    sums = DifferenceSums(stored.shape[1], stored.dtype, stored.dtype)
    assert sums.add(torch.zeros_like(stored), stored, torch.empty(stored.shape))
    return sums.noise()


@given(st.floats(1e-4, 1e4), st.sampled_from([*SIXTEEN_BITS, torch.float32]))
def test_ulp_is_the_distance_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    stored = torch.tensor([value], dtype=dtype)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    following = (stored.view(width) + 1).view(dtype)
    assert ulp(stored).double().item() == (following.double() - stored.double()).item()
    assert torch.equal(ulp(-stored), ulp(stored))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_floor_bounds_the_norm_of_real_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    exact = torch.randn(400, 300, dtype=torch.float64) * 0.02
    stored = exact.to(dtype)
    error = stored.double() - exact
    floor = noise_floor(stored)
    largest = torch.linalg.svdvals(error)[0].item()
    assert largest < floor.threshold < 1.3 * largest
    assert floor.energy == pytest.approx(error.square().sum().item(), rel=0.02)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32])
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e-4, 1.0, 1e4, 1e20, 1e37])
def test_floor_is_that_of_the_formula_at_any_size(dtype: torch.dtype, size: float) -> None:
    """Squares of ulps leave float32's range long before the ulps do. Fine rows beside coarse."""
    if dtype == torch.float16 and not 1e-5 < size < 1e5:
        return
    torch.manual_seed(4)
    rows = torch.tensor([1.0, 1e-3, 0.0, 1e-1]).repeat(50)[:, None]
    stored = (torch.randn(200, 700) * rows * size / 10).to(dtype)
    variance = ulp(stored).double().square() / 12
    threshold = variance.sum(1).max().sqrt() + variance.sum(0).max().sqrt()
    floor = noise_floor(stored)
    assert floor.threshold == pytest.approx(float(threshold), rel=1e-5)
    assert floor.energy == pytest.approx(float(variance.sum()), rel=1e-5)


def change(
    dtype: torch.dtype, relative: float, tail: float = 0.0, rank: int = 8
) -> tuple[torch.Tensor, NoiseFloor, float]:
    """D, its floor and its share of changed entries: rank-r update plus a full-rank tail."""
    generator = torch.Generator().manual_seed(11)
    rows, columns = 560, 700
    base = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    b = torch.randn(rows, rank, generator=generator)
    update = b @ torch.randn(rank, columns, generator=generator)
    update *= relative * base.float().norm() / update.norm()
    if tail:
        rest = torch.randn(rows, columns, generator=generator)
        update += rest * tail * update.norm() / rest.norm()
    tuned = (base.float() + update).to(dtype)
    d = tuned.float() - base.float()
    return d, noise_floor(tuned), float((d != 0).float().mean())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("relative", [0.003, 0.01, 0.1])
def test_auto_finds_the_rank(dtype: torch.dtype, relative: float) -> None:
    d, floor, _ = change(dtype, relative)
    factors = factorize(d, parse_rank_rule("auto"), key="k", noise_floor=floor.threshold)
    assert factors.rank == 8


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("relative", [0.003, 0.005, 0.02, 0.1])
@pytest.mark.parametrize("rank", [3, 4, 16, 32])
def test_auto_finds_any_rank(dtype: torch.dtype, relative: float, rank: int) -> None:
    d, floor, _ = change(dtype, relative, rank=rank)
    factors = factorize(d, parse_rank_rule("auto"), key="k", noise_floor=floor.threshold)
    assert factors.rank == rank


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(("rank", "relative"), [(1, 0.003), (1, 0.01), (1, 0.03), (2, 0.005)])
def test_a_pattern_of_the_rounding_is_said_to_be_one(
    dtype: torch.dtype, rank: int, relative: float
) -> None:
    """Entries of an update of so low a rank differ much in size, and so does their rounding."""
    d, floor, _ = change(dtype, relative / (8 if dtype == torch.float16 else 1), rank=rank)
    rule = parse_rank_rule("auto")
    found = factorize(d, rule, key="k", noise_floor=floor.threshold).rank
    spectrum = factorize(d, parse_rank_rule("16"), key="k").spectrum
    said = lora_rank(spectrum, floor, 1.0)
    assert said is not None
    assert said.least == rank
    assert said.rank == found > rank
    short = replace(spectrum, values=spectrum.values[: rank + 1])
    beyond = lora_rank(short, floor, 1.0)
    assert beyond is not None
    assert (beyond.rank, beyond.least) == (None, rank)


def answer(dtype: torch.dtype, relative: float, tail: float = 0.0) -> LoraAnswer | None:
    d, floor, changed = change(dtype, relative, tail)
    spectrum = factorize(d, parse_rank_rule("16"), key="k").spectrum
    return lora_rank(spectrum, floor, changed)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32])
@pytest.mark.parametrize("relative", [0.01, 0.1])
def test_a_lora_is_recognised_and_a_tail_is_not_taken_for_one(
    dtype: torch.dtype, relative: float
) -> None:
    plain, tailed = answer(dtype, relative), answer(dtype, relative, tail=0.05)
    assert plain is not None
    assert plain.rank == 8
    assert plain.tail < 0.05
    assert tailed is not None
    assert tailed.rank is None


@pytest.mark.parametrize("relative", [0.1, 1.0])
def test_what_float32_products_add_is_not_taken_for_a_component(relative: float) -> None:
    """Of a large change of a float32 checkpoint it is more than the rounding."""
    d, floor, changed = change(torch.float32, relative)
    for key in "abcde":
        auto = factorize(d, parse_rank_rule("auto"), key=key, noise_floor=floor.threshold)
        assert auto.method == "block Krylov"
        assert auto.rank == 8
        found = lora_rank(auto.spectrum, floor, changed)
        assert found is not None
        assert found.rank == 8


def test_a_lora_extracted_at_its_own_rank_is_recognised() -> None:
    d, floor, changed = change(torch.bfloat16, 0.01)
    factors = factorize(d, parse_rank_rule("8"), key="k")
    assert factors.rank == 8
    found = lora_rank(factors.spectrum, floor, changed)
    assert found is not None
    assert found.rank == 8


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("ulps", [0.15, 0.3, 0.6, 1.2, 2.5])
def test_singular_values_are_biased_low_just_where_the_warning_is(
    dtype: torch.dtype, ulps: float
) -> None:
    """ulps: the update's root mean square, in that of an ulp of the base."""
    generator = torch.Generator().manual_seed(5)
    base = (torch.randn(300, 200, generator=generator) * 0.02).to(dtype)
    b = torch.randn(300, 4, generator=generator)
    update = b @ torch.randn(4, 200, generator=generator)
    update *= ulps * ulp(base).norm() / update.norm()
    tuned = (base.float() + update).to(dtype)
    d = tuned.float() - base.float()
    share = noise_floor(tuned).share_of(float(d.square().sum()))
    found, true = torch.linalg.svdvals(d)[:4], torch.linalg.svdvals(update)[:4]
    bias = float((found / true).mean()) - 1
    assert (share >= BIASED) == (bias < -0.015), (share, bias)


def test_a_change_of_full_rank_in_float32_is_no_loras() -> None:
    """Its last few components hold less than float32 arithmetic can see, and are there."""
    torch.manual_seed(6)
    d = torch.randn(128, 8) @ torch.randn(8, 160) / 8**0.5 + 0.02 * torch.randn(128, 160)
    base = torch.randn(128, 160)
    spectrum = factorize(base + d / 50 - base, parse_rank_rule("16"), key="k").spectrum
    assert spectrum.is_complete
    found = lora_rank(spectrum, noise_floor(base + d / 50), 1.0)
    assert found is not None
    assert (found.rank, found.least) == (None, None)


def test_what_cannot_be_decided_is_not_answered() -> None:
    assert answer(torch.bfloat16, 0.0005) is None  # most entries did not change at all
    spectrum = Spectrum(torch.tensor([1.0, 0.5]).double(), 2.0, (10, 10))
    assert lora_rank(spectrum, NoiseFloor(0.0, 0.0), 1.0) is None
    assert lora_rank(spectrum, NoiseFloor(1.0, 3.0), 1.0) is None


def test_the_stated_power_is_true() -> None:
    """A tail a little above the stated one is noticed."""
    plain = answer(torch.bfloat16, 0.02)
    assert plain is not None
    noticed = answer(torch.bfloat16, 0.02, tail=1.3 * plain.tail)
    assert noticed is not None
    assert noticed.rank is None


def merged(
    base: torch.Tensor, relative: float, *, rank: int, tail: float = 0.0, rounded: bool = False
) -> tuple[torch.Tensor, NoiseFloor, float]:
    """As ``change``, for a base of one's own. rounded: the update first, as PEFT merges."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = base.shape
    b = torch.randn(rows, rank, generator=generator)
    update = b @ torch.randn(rank, columns, generator=generator)
    update *= relative * base.float().norm() / update.norm()
    rest = torch.randn(rows, columns, generator=generator)
    update += rest * tail * update.norm() / rest.norm()
    tuned = base + update.to(base.dtype) if rounded else (base.float() + update).to(base.dtype)
    d = tuned.float() - base.float()
    return d, noise_floor(tuned), float((d != 0).float().mean())


def said_of(found: tuple[torch.Tensor, NoiseFloor, float]) -> LoraAnswer:
    d, floor, changed = found
    said = lora_rank(factorize(d, parse_rank_rule("32"), key="k").spectrum, floor, changed)
    assert said is not None
    return said


def uneven(columns: bool) -> torch.Tensor:
    """A bf16 base of rows, or columns, of very different sizes."""
    generator = torch.Generator().manual_seed(6)
    weights = torch.randn(600, 800, generator=generator) * 0.02
    sizes = torch.randn((1, 800) if columns else (600, 1), generator=generator)
    return (weights * torch.exp(1.5 * sizes)).bfloat16()


@pytest.mark.parametrize("relative", [0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_large_lora_merged_by_peft_is_recognised(relative: float, rank: int) -> None:
    """PEFT rounds the update too, which was taken for a tail."""
    base = random_base()
    assert said_of(merged(base, relative, rank=rank, rounded=True)).least == rank
    tailed = merged(base, relative, rank=rank, rounded=True, tail=0.01)
    assert said_of(tailed).least is None


def random_base() -> torch.Tensor:
    return (torch.randn(600, 800, generator=torch.Generator().manual_seed(7)) * 0.02).bfloat16()


@pytest.mark.parametrize("columns", [False, True])
def test_what_would_go_unnoticed_is_more_where_weights_differ_in_size(columns: bool) -> None:
    """Of the large ones many did not change, and so were rounded less than is expected of them."""
    said = said_of(merged(uneven(columns), 0.01, rank=8))
    assert said.rank == said.least == 8
    unnoticed = said_of(merged(uneven(columns), 0.01, rank=8, tail=0.9 * said.tail))
    noticed = said_of(merged(uneven(columns), 0.01, rank=8, tail=1.3 * said.tail))
    assert unnoticed.least == 8
    assert noticed.least is None


def test_components_below_the_floor_may_be_the_updates() -> None:
    """A few large columns make the floor high: that no LoRA explains the change was wrong."""
    said = said_of(merged(uneven(True), 0.003, rank=8))
    assert said.rank is None
    assert said.least is not None
    assert said.least <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("relative", [0.1, 1.0])
def test_values_alone_tell_a_lora_too(dtype: torch.dtype, rank: int, relative: float) -> None:
    """What steering in bf16 makes them miss, 10⁻⁶ of the energy, was taken for a tail."""
    d, floor, changed = change(dtype, relative, rank=rank)
    rule, bf16 = parse_rank_rule("32"), torch.bfloat16
    said = lora_rank(resolve_spectrum(d, rule, key="k", sketch_dtype=bf16), floor, changed)
    assert said is not None
    assert said.least == rank


def test_unchanged_entries_hide_nothing_of_a_change_that_is_large() -> None:
    """Pruning, and a LoRA of some rows: both were said to be hidden by rounding."""
    base = random_base()
    pruned = torch.where(base.float().abs() < 0.005, 0.0, base.float()) - base.float()
    share = float((pruned != 0).float().mean())
    assert share < 0.25
    assert said_of((pruned, noise_floor(base), share)).least is None
    d, _, _ = merged(base, 0.05, rank=8)
    d[150:] = 0
    said = said_of((d, noise_floor((base.float() + d).bfloat16()), float((d != 0).float().mean())))
    assert said.rank == said.least == 8
