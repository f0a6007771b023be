"""Many elements at once against exact integers: near ties, which small examples seldom hold.

All stored values are integers times one power of two here, so the exact result is an integer too.
The weights are the negated changes, rounded: what is left of the sum is far below its terms, and
float64 alone, or one rounding too many, would get a good part of it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from loratool.algebra.certified_terms import CertifiedTerms
from loratool.algebra.dora import CertifiedDora, Dora
from loratool.algebra.exact_matrix import (
    ExactMatrix,
    Kronecker,
    Product,
    Scaled,
    Stored,
    low_rank_matrix,
    matrix_product,
)
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import MERGEABLE, CertifiedSum, Rounder
from tests.algebra.reference import FORMATS, same_bits

SHIFT = 38
"""Factors are multiples of 2^-SHIFT, of at most 24 bits."""
SCALE = 16 / 3
NUMERATOR, DENOMINATOR = SCALE.as_integer_ratio()
SCALE_SHIFT = DENOMINATOR.bit_length() - 1

Integers = np.ndarray


def whole(values: Tensor, places: int) -> Integers:
    """Values · 2^places as Python integers; exact, for they are multiples of 2^-places."""
    mantissa, exponent = np.frexp(values.double().numpy())
    integers = (mantissa * 2.0**53).astype(np.int64).astype(object)
    shift = (exponent + places - 53).astype(object)
    return np.where(shift >= 0, integers << np.maximum(shift, 0), integers >> np.maximum(-shift, 0))


def round_integers(values: Integers, places: int, dtype: torch.dtype) -> Tensor:
    """Nearest values of ``dtype`` to integers · 2^-places, ties to even."""
    precision, lowest, _ = FORMATS[dtype]
    size = np.abs(values)
    length = np.frompyfunc(int.bit_length, 1, 1)(size)
    drop = np.maximum(length - precision, places + lowest - precision + 1).clip(min=0)
    half = np.where(drop > 0, 1 << np.maximum(drop - 1, 0), 0)
    kept, rest = size >> drop, size & ((1 << drop) - 1)
    up = (rest > half) | ((rest == half) & (kept & 1 == 1) & (drop > 0))
    rounded = (kept + up) << drop
    signed = np.where(values < 0, -rounded, rounded)
    return torch.from_numpy((signed / (1 << places)).astype(np.float64)).to(dtype)


def factor(rows: int, columns: int, bits: int, generator: torch.Generator) -> Tensor:
    limit = 2**bits
    values = torch.randint(-limit, limit, (rows, columns), generator=generator)
    exponents = torch.randint(-SHIFT, 13 - SHIFT, (rows, columns), generator=generator)
    return (values * 2.0**exponents).float()


Made = tuple[ExactMatrix, Integers, int]


def low_rank(rows: int, columns: int, generator: torch.Generator) -> Made:
    b, a = factor(rows, 5, 24, generator), factor(5, columns, 24, generator)
    exact = whole(b, SHIFT) @ whole(a, SHIFT) * NUMERATOR
    return low_rank_matrix(LowRank(b, a, SCALE)), exact, 2 * SHIFT + SCALE_SHIFT


def loha(rows: int, columns: int, generator: torch.Generator) -> Made:
    b1, b2 = (factor(rows, 3, 24, generator) for _ in range(2))
    a1, a2 = (factor(3, columns, 24, generator) for _ in range(2))
    first, second = whole(b1, SHIFT) @ whole(a1, SHIFT), whole(b2, SHIFT) @ whole(a2, SHIFT)
    matrix = Product(matrix_product(b1, a1), matrix_product(b2, a2))
    return Scaled(matrix, SCALE), first * second * NUMERATOR, 4 * SHIFT + SCALE_SHIFT


def lokr(rows: int, columns: int, generator: torch.Generator) -> Made:
    w1 = factor(rows // 16, columns // 16, 24, generator)
    b, a = factor(16, 3, 24, generator), factor(3, 16, 24, generator)
    exact = np.kron(whole(w1, SHIFT), whole(b, SHIFT) @ whole(a, SHIFT)) * NUMERATOR
    return (
        Scaled(Kronecker(Stored(w1), matrix_product(b, a)), SCALE),
        exact,
        3 * SHIFT + SCALE_SHIFT,
    )


KINDS: dict[str, Callable[[int, int, torch.Generator], Made]] = {
    "low-rank": low_rank,
    "LoHa": loha,
    "LoKr": lokr,
}


def compare(kind: str, dtype: torch.dtype, rows: int, columns: int, *, near: bool) -> int:
    """How many elements were decided exactly; asserts that every one is right."""
    generator = torch.Generator().manual_seed(5)
    matrix, exact, places = KINDS[kind](rows, columns, generator)
    if near:
        w0 = round_integers(-exact, places, dtype)
    else:
        w0 = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    places_of_all = max(places, 160)
    total = whole(w0, places_of_all) + (exact << (places_of_all - places))
    expected = round_integers(total, places_of_all, dtype)
    rounders: list[Rounder] = [CertifiedTerms([matrix])]
    if kind == "low-rank":
        assert isinstance(matrix, Scaled)
        product = matrix.matrix
        rounders.append(CertifiedSum([LowRank(product.b.float(), product.a.float(), SCALE)]))
    decided = 0
    for rounder in rounders:
        block = rounder.add_to(w0, 0, dtype)
        assert same_bits(block.values + 0.0, expected + 0.0)  # −0 aside, which has its own test
        decided += block.level3
    return decided


@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cancels_is_rounded_exactly(kind: str, dtype: torch.dtype) -> None:
    decided = compare(kind, dtype, 64, 96, near=True)
    assert decided > 0 or dtype != torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("dtype", MERGEABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_million_elements(kind: str, dtype: torch.dtype, near: bool) -> None:
    """Over all cases together: 18 · 1024 · 576, more than 10⁷."""
    compare(kind, dtype, 1024, 576, near=near)


# DoRA -----------------------------------------------------------------------------------------


def compare_dora(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Each result t is nearest to m·V/‖V‖: (m·V)² lies between (midpoints)² · ΣV².

    The first of each row is as near to a midpoint as float64 magnitudes can bring it, and what
    cancels leaves float64 few right digits of it.
    """
    generator = torch.Generator().manual_seed(6)
    change, exact, places = low_rank(rows, columns, generator)
    w0 = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    w0[:, :1] = round_integers(-exact[:, :1], places, dtype)
    places_of_all = max(places, 160)
    v = whole(w0, places_of_all) + (exact << (places_of_all - places))
    near = torch.rand(rows, generator=generator).to(dtype) + 1
    middles = (near.double() + torch.finfo(dtype).eps / 2) * 2.0**-9
    lengths = np.sqrt((v.astype(np.float64) ** 2).sum(axis=1))
    sizes = np.abs(v).astype(np.float64)
    magnitude = middles * torch.from_numpy(lengths / sizes[:, 0])
    peaks = magnitude * torch.from_numpy(sizes.max(axis=1) / lengths)
    magnitude = torch.where(peaks < 1e4, magnitude, 0.7)  # not beyond fp16
    block = CertifiedDora([Dora(change, magnitude)], [], lambda i, j: w0[i:j]).add_to(w0, 0, dtype)
    merged = block.values
    assert block.level3 >= rows // 4
    norms = (v * v).sum(axis=1)[:, None]
    sides = (np.abs(v) * whole(magnitude, places_of_all)[:, None]) ** 2
    size = merged.abs()
    below, above = size.clone(), size.clone()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    below.view(bits).sub_((size > 0).to(bits))
    above.view(bits).add_(1)
    even = (size.view(bits) & 1).numpy() == 0
    for other, sign in ((below, -1), (above, 1)):
        middle = whole(size, places_of_all) + whole(other, places_of_all)  # twice the midpoint
        distance = sign * (middle * middle * norms - 4 * sides)
        assert bool(((distance > 0) | ((distance == 0) & even)).all())
    assert bool(((merged < 0) == torch.from_numpy((v < 0).astype(bool)))[merged != 0].all())


@pytest.mark.parametrize("dtype", MERGEABLE)
def test_dora_is_rounded_to_nearest(dtype: torch.dtype) -> None:
    compare_dora(dtype, 24, 128)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", MERGEABLE)
def test_dora_on_many_elements(dtype: torch.dtype) -> None:
    compare_dora(dtype, 1024, 1024)


def test_the_reference_rounds_as_fractions_do() -> None:
    values = np.array([3, -5, 2**30 + 1, 0, 257, 259], dtype=object)
    rounded = round_integers(values, 8, torch.bfloat16)
    assert rounded.tolist() == [3 / 256, -5 / 256, 2.0**22, 0.0, 1.0, 1.015625]
    assert math.isclose(float(whole(torch.tensor([0.75]), 4)[0]), 12)
