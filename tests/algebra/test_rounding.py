"""Merged weights equal the correctly rounded exact sum, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import MERGEABLE, CertifiedSum, round_float64
from loratool.errors import NonFiniteValues, UnsupportedInput
from tests.algebra.reference import exact_merge, round_fraction, same_bits

DTYPES = st.sampled_from(MERGEABLE)
SCALES = st.sampled_from([1.0, 2.0, 16 / 3, 8 / math.sqrt(3), -0.7, 1e-3, 0.0])


@st.composite
def tensors(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Values that provoke: grids of powers of two (ties), mixed magnitudes, zeros, tiny ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "grid", "mixed", "sparse", "tiny"]))
    values = torch.randn(rows, columns, generator=generator)
    if kind == "grid":
        values = torch.randint(-4, 5, (rows, columns), generator=generator) * 2.0 ** draw(
            st.integers(-12, 2)
        )
    elif kind == "mixed":
        values = values * 2.0 ** torch.randint(-14, 4, (rows, columns), generator=generator)
    elif kind == "sparse":
        values = values * (torch.rand(rows, columns, generator=generator) < 0.4)
    elif kind == "tiny":
        values = values * torch.finfo(dtype).tiny
    return values.to(dtype)


@st.composite
def merges(
    draw: st.DrawFn,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, float]], torch.dtype]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    terms = []
    for _ in range(draw(st.integers(1, 2))):
        rank, stored = draw(st.integers(1, 6)), draw(DTYPES)
        b = draw(tensors(rows, rank, stored))
        a = draw(tensors(rank, columns, stored))
        terms.append((b, a, draw(SCALES)))
    if len(terms) == 2 and draw(st.booleans()):
        b, a, scale = terms[0]
        terms[1] = (b, a, -scale)  # cancels exactly
    return draw(tensors(rows, columns, dtype := draw(DTYPES))), terms, dtype


def merged(w0: Tensor, terms: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Tensor:
    return CertifiedSum([LowRank(*term) for term in terms]).add_to(w0, 0, dtype).values


@settings(max_examples=300, deadline=None)
@given(merges())
def test_equals_exact_rational_arithmetic(
    case: tuple[Tensor, list[tuple[Tensor, Tensor, float]], torch.dtype],
) -> None:
    w0, terms, dtype = case
    assert same_bits(merged(w0, terms, dtype), exact_merge(w0, terms, dtype))


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_exact_ties_go_to_even(dtype: torch.dtype) -> None:
    """W0 one ulp grid, updates of exactly half an ulp: every element is a tie."""
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[dtype]
    w0 = (1 + torch.arange(64, dtype=torch.float64) * 2.0**-bits).to(dtype).reshape(8, 8)
    b, a = torch.full((8, 1), 2.0 ** -(bits + 1)), torch.ones(1, 8)
    result = merged(w0, [(b, a, 1.0)], dtype)
    assert same_bits(result, exact_merge(w0, [(b, a, 1.0)], dtype))
    assert not same_bits(result, w0)  # half of the ties move up to even


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_negative_zero_survives_an_update_of_zero(dtype: torch.dtype) -> None:
    w0 = torch.tensor([[-0.0, 0.0, 1.0]], dtype=dtype)
    b, a = torch.zeros(1, 2), torch.randn(2, 3)
    assert same_bits(merged(w0, [(b, a, 3.0)], dtype), w0)


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_exact_cancellation_gives_positive_zero(dtype: torch.dtype) -> None:
    w0 = torch.tensor([[0.5, -0.25]], dtype=dtype)
    b, a = torch.ones(1, 1), -w0.float()
    assert same_bits(merged(w0, [(b, a, 1.0)], dtype), torch.zeros(1, 2, dtype=dtype))


def test_overflow_is_infinite_and_counted() -> None:
    w0 = torch.tensor([[60000.0, 1.0]], dtype=torch.float16)
    block = CertifiedSum([LowRank(torch.ones(1, 1), torch.tensor([[6000.0, 1.0]]))]).add_to(
        w0, 0, torch.float16
    )
    assert block.values.tolist() == [[float("inf"), 2.0]]
    assert block.overflowed == 1


def test_largest_value_plus_less_than_half_an_ulp_stays_finite() -> None:
    w0 = torch.tensor([[65504.0]], dtype=torch.float16)
    update = [(torch.ones(1, 1), torch.tensor([[15.9]]), 1.0)]
    assert merged(w0, update, torch.float16).item() == 65504.0
    assert exact_merge(w0, update, torch.float16).item() == 65504.0


def test_non_finite_inputs_are_named() -> None:
    w0 = torch.zeros(3, 2)
    w0[2, 1] = float("nan")
    update = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    with pytest.raises(NonFiniteValues, match=r"\[2, 1\]"):
        CertifiedSum([update]).add_to(w0, 0, torch.float32)
    with pytest.raises(NonFiniteValues):
        CertifiedSum([LowRank(torch.ones(3, 1), torch.tensor([[float("inf"), 0.0]]))])
    with pytest.raises(UnsupportedInput):
        CertifiedSum([LowRank(torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 2))])


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_block_sizes_do_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    w0, b, a = torch.randn(96, 64).to(dtype) * 0.02, torch.randn(96, 8) * 0.1, torch.randn(8, 64)
    summed = CertifiedSum([LowRank(b, a, 0.03)])
    whole = summed.add_to(w0, 0, dtype).values
    for step in (1, 7, 32):
        parts = [summed.add_to(w0[i : i + step], i, dtype).values for i in range(0, 96, step)]
        assert same_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_a_million_elements_against_long_double(dtype: torch.dtype) -> None:
    """Where numpy's 64-bit significand decides the rounding, it decides it as we do."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double here")
    torch.manual_seed(1)
    w0 = (torch.randn(1024, 1024) * 0.02).to(dtype)
    b, a = torch.randn(1024, 4) * 0.05, torch.randn(4, 1024) * 0.05
    scale = 16 / 3
    wide = w0.double().numpy().astype(np.longdouble)
    for k in range(4):
        wide += np.longdouble(scale) * np.outer(b[:, k].double().numpy(), a[k].double().numpy())
    result = merged(w0, [(b, a, scale)], dtype)
    candidates = torch.from_numpy(wide.astype(np.float64))
    nearest = round_float64(candidates, dtype)
    differing = torch.nonzero(result != nearest)
    assert len(differing) < 50  # double rounding of the reference, checked exactly
    for i, j in differing.tolist():
        assert same_bits(
            result[i : i + 1, j : j + 1],
            exact_merge(w0[i : i + 1, j : j + 1], [(b[i : i + 1], a[:, j : j + 1], scale)], dtype),
        )


@settings(max_examples=500, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, width=64), DTYPES)
def test_one_rounding_from_float64(value: float, dtype: torch.dtype) -> None:
    rounded = round_float64(torch.tensor([value], dtype=torch.float64), dtype)
    assert rounded.item() == round_fraction(Fraction(value), dtype)


def test_the_frameworks_own_cast_rounds_twice() -> None:
    """Why round_float64 exists: this value is above a bf16 tie by less than float32 can hold."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert value.to(torch.float32).to(torch.bfloat16).item() == 1.0
    assert round_float64(value, torch.bfloat16).item() == 1 + 2.0**-7


@pytest.mark.parametrize(
    ("scale", "size"),
    [(1e38, 1e-20), (1e40, 1e-21), (1e300, 1e-38), (2.0**21, 1e-4), (1e-48, 1e23), (1e-30, 1e14)],
)
@pytest.mark.parametrize("dtype", MERGEABLE)
def test_scales_beyond_what_float32_can_follow(
    scale: float, size: float, dtype: torch.dtype
) -> None:
    """B·A is subnormal or infinite in float32, s itself may be; s·B·A is of ordinary size."""
    torch.manual_seed(0)
    w0 = (torch.randn(24, 24) * 0.1).to(dtype)
    b, a = torch.randn(24, 4) * size, torch.randn(4, 24) * size
    found = CertifiedSum([LowRank(b, a, scale)]).add_to(w0, 0, dtype)
    expected = exact_merge(w0, [(b, a, scale)], dtype)
    assert same_bits(found.values, expected)
    assert found.changed == int((expected != w0).sum())
