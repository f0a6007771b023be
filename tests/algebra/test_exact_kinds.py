"""LoHa, LoKr, differences and DoRA against exact rational arithmetic, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.certified_terms import CertifiedTerms
from loratool.algebra.dora import CertifiedDora, Dora, sum_of_roots
from loratool.algebra.exact_matrix import (
    ExactMatrix,
    Kronecker,
    Product,
    Scaled,
    Spread,
    Stored,
    Tucker,
    low_rank_matrix,
    matrix_product,
)
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import MERGEABLE, CertifiedSum
from loratool.errors import NonFiniteValues, UnsupportedInput
from tests.algebra.reference import round_fraction, same_bits
from tests.algebra.test_rounding import DTYPES, SCALES, tensors

Entries = list[list[Fraction]]


def entries(matrix: Tensor) -> Entries:
    return [[Fraction(float(x)) for x in row] for row in matrix.tolist()]


def product(b: Entries, a: Entries) -> Entries:
    return [
        [sum((x * a[k][j] for k, x in enumerate(row)), Fraction(0)) for j in range(len(a[0]))]
        for row in b
    ]


def kron(x: Entries, y: Entries) -> Entries:
    return [
        [
            x[i // len(y)][j // len(y[0])] * y[i % len(y)][j % len(y[0])]
            for j in range(len(x[0]) * len(y[0]))
        ]
        for i in range(len(x) * len(y))
    ]


def tucker(t: Tensor, b: Tensor, a: Tensor) -> Entries:
    core, left, right = t.flatten(2).tolist(), entries(b), entries(a)
    return [
        [
            sum(
                (
                    Fraction(core[i][j][k]) * left[i][p] * right[j][q]
                    for i in range(len(left))
                    for j in range(len(right))
                ),
                Fraction(0),
            )
            for q in range(len(right[0]))
            for k in range(len(core[0][0]))
        ]
        for p in range(len(left[0]))
    ]


def rounded_sum(w0: Tensor, changes: list[Entries], dtype: torch.dtype) -> Tensor:
    result = torch.empty(w0.shape, dtype=torch.float64)
    for i, row in enumerate(entries(w0)):
        for j, start in enumerate(row):
            total = start + sum((change[i][j] for change in changes), Fraction(0))
            keeps = total == 0 and start == 0
            result[i, j] = float(w0[i, j]) if keeps else round_fraction(total, dtype)
    return result.to(dtype)


# Additive kinds -------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn, rows: int, columns: int) -> tuple[ExactMatrix, Entries]:
    """One scaled term of a drawn kind with its exact entries."""
    stored, scale = draw(DTYPES), draw(SCALES)

    def values(*shape: int) -> Tensor:
        return draw(tensors(shape[0], math.prod(shape[1:]), stored)).reshape(shape)

    kind = draw(
        st.sampled_from(["dense", "lowrank", "loha", "lokr", "lokr whole", "tucker", "spread"])
    )
    rank = draw(st.integers(1, 3))
    if kind == "dense":
        x = values(rows, columns)
        matrix, exact = Stored(x), entries(x)
    elif kind in ("lowrank", "spread"):
        b, a = values(rows, rank), values(rank, columns)
        matrix, exact = matrix_product(b, a), product(entries(b), entries(a))
        if kind == "spread":
            places = draw(st.lists(st.integers(-1, rows - 1), min_size=rows, max_size=rows))
            matrix = Spread(matrix, torch.tensor(places))
            exact = [exact[p] if p >= 0 else [Fraction(0)] * columns for p in places]
    elif kind == "loha":
        b1, a1, b2, a2 = (
            values(rows, rank),
            values(rank, columns),
            values(rows, rank),
            values(rank, columns),
        )
        matrix = Product(matrix_product(b1, a1), matrix_product(b2, a2))
        one, two = product(entries(b1), entries(a1)), product(entries(b2), entries(a2))
        exact = [[x * y for x, y in zip(*pair, strict=True)] for pair in zip(one, two, strict=True)]
    elif kind == "tucker":
        t, b, a = values(rank, rank, 1, columns), values(rank, rows), values(rank, 1)
        matrix, exact = Tucker(t, b, a), tucker(t, b, a)
    else:
        c = draw(st.sampled_from([k for k in range(1, columns + 1) if columns % k == 0]))
        h = draw(st.sampled_from([k for k in range(1, rows + 1) if rows % k == 0]))
        first, second = values(h, c), values(rows // h, columns // c)
        if kind == "lokr whole":
            matrix = Kronecker(Stored(first), Stored(second))
            exact = kron(entries(first), entries(second))
        else:
            b, a = values(rows // h, rank), values(rank, columns // c)
            matrix = Kronecker(Stored(first), matrix_product(b, a))
            exact = kron(entries(first), product(entries(b), entries(a)))
    return Scaled(matrix, scale), [[Fraction(scale) * x for x in row] for row in exact]


@st.composite
def sums(draw: st.DrawFn) -> tuple[Tensor, list[tuple[ExactMatrix, Entries]], torch.dtype]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    terms = [draw(changes(rows, columns)) for _ in range(draw(st.integers(1, 2)))]
    dtype = draw(DTYPES)
    w0 = draw(tensors(rows, columns, dtype))
    if draw(st.booleans()):  # what is near −ΔW cancels, and leaves the smallest bits to decide
        w0 = rounded_sum(torch.zeros(rows, columns), [terms[0][1]], dtype).neg()
        w0 = torch.where(torch.isfinite(w0), w0, 0.0)
    if draw(st.booleans()):
        matrix, exact = terms[0]
        assert isinstance(matrix, Scaled)
        terms.append((Scaled(matrix.matrix, -matrix.factor), [[-x for x in row] for row in exact]))
    return w0, terms, dtype


@settings(max_examples=200)
@given(sums(), st.booleans())
def test_additive_kinds_equal_exact_rational_arithmetic(
    case: tuple[Tensor, list[tuple[ExactMatrix, Entries]], torch.dtype], turned: bool
) -> None:
    w0, terms, dtype = case
    expected = rounded_sum(w0, [exact for _, exact in terms], dtype)
    if turned and not any(isinstance(term.matrix, Tucker) for term, _ in terms):
        merged = CertifiedTerms([term.T for term, _ in terms]).add_to(w0.T.contiguous(), 0, dtype)
        assert same_bits(merged.values.T.contiguous(), expected)
    else:
        merged = CertifiedTerms([term for term, _ in terms]).add_to(w0, 0, dtype)
        assert same_bits(merged.values, expected)
    if bool(torch.isfinite(expected).all()):
        assert merged.overflowed == 0


def test_blocks_of_rows_count_from_their_start() -> None:
    torch.manual_seed(0)
    w0, b, a = torch.randn(12, 7).half(), torch.randn(12, 2), torch.randn(2, 7)
    term = Scaled(Product(matrix_product(b, a), matrix_product(b.flip(0), a)), 0.3)
    whole = CertifiedTerms([term]).add_to(w0, 0, torch.float16).values
    late = CertifiedTerms([term], start=4)
    assert same_bits(late.add_to(w0[6:9], 2, torch.float16).values, whole[6:9])


def test_both_rounders_agree_on_low_rank_updates() -> None:
    """The fast one for plain updates and the general one have one definition of the result."""
    torch.manual_seed(1)
    for dtype in MERGEABLE:
        w0 = (torch.randn(64, 96) * 0.02).to(dtype)
        value = LowRank(torch.randn(64, 4) * 0.05, torch.randn(4, 96) * 0.05, 16 / 3)
        one = CertifiedSum([value]).add_to(w0, 0, dtype)
        two = CertifiedTerms([low_rank_matrix(value)]).add_to(w0, 0, dtype)
        assert same_bits(one.values, two.values)
        assert one.changed == two.changed


def test_factors_that_cannot_be_exact_are_refused() -> None:
    with pytest.raises(UnsupportedInput, match="float64"):
        Stored(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(NonFiniteValues):
        matrix_product(torch.full((2, 1), math.nan), torch.zeros(1, 2))
    with pytest.raises(NonFiniteValues, match=r"\[3, 1\]"):
        CertifiedTerms([Stored(torch.zeros(9, 2))]).add_to(
            torch.tensor([[0.0, math.inf]]), 3, torch.float32
        )


# DoRA -----------------------------------------------------------------------------------------


def root_to(value: Fraction, digits: int) -> Fraction:
    """√value, rounded down to this many bits behind the point; exact where it is rational."""
    p, q = value.as_integer_ratio()
    return Fraction(math.isqrt(p * q << 2 * digits), q << digits)


def exact_dora(
    w0: Tensor, doras: list[tuple[Entries, list[float], float]], extra: Entries, dtype: torch.dtype
) -> Tensor:
    """By rows, with roots to 2000 bits: far finer than any near tie that these cases hold."""
    result = torch.empty(w0.shape, dtype=torch.float64)
    base = entries(w0)
    for i, row in enumerate(base):
        norms = [
            root_to(
                sum(((x + y) ** 2 for x, y in zip(row, change[i], strict=True)), Fraction(0)), 2000
            )
            for change, _, _ in doras
        ]
        for j, start in enumerate(row):
            total = start + extra[i][j]
            for (change, magnitude, weight), norm in zip(doras, norms, strict=True):
                if not math.isnan(magnitude[i]):
                    new = Fraction(magnitude[i]) * (start + change[i][j]) / norm
                    total += Fraction(weight) * (new - start)
            if abs(total) < Fraction(1, 2**1500):
                total = Fraction(0)
            keeps = total == 0 and start == 0
            result[i, j] = float(w0[i, j]) if keeps else round_fraction(total, dtype)
    return result.to(dtype)


@st.composite
def dora_cases(
    draw: st.DrawFn,
) -> tuple[Tensor, list[tuple[ExactMatrix, Entries, Tensor, float]], torch.dtype]:
    rows, columns, dtype = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(DTYPES)
    w0 = draw(tensors(rows, columns, dtype))
    if draw(st.booleans()):  # one entry in a row, or 3-4-5: norms that are rational
        w0 = torch.zeros_like(w0)
        w0[:, 0] = 3 * 2.0 ** draw(st.integers(-6, 3))
        if columns > 1 and draw(st.booleans()):
            w0[:, 1] = w0[:, 0] / 3 * 4
    doras = []
    for _ in range(draw(st.integers(1, 2))):
        stored, rank, scale = draw(DTYPES), draw(st.integers(1, 3)), draw(SCALES)
        b, a = draw(tensors(rows, rank, stored)), draw(tensors(rank, columns, stored))
        if draw(st.booleans()):
            b = torch.zeros_like(b)
        exact = [[Fraction(scale) * x for x in row] for row in product(entries(b), entries(a))]
        magnitude = draw(tensors(rows, 1, torch.float32))[:, 0].abs().double()
        if draw(st.integers(0, 3)) == 0:
            magnitude[0] = math.nan  # not covered
        weight = draw(st.sampled_from([1.0, 1.0, 0.5, -0.3, 2.0]))
        doras.append((low_rank_matrix(LowRank(b, a, scale)), exact, magnitude, weight))
    return w0, doras, dtype


@settings(max_examples=150)
@given(dora_cases(), st.booleans())
def test_dora_equals_exact_arithmetic(
    case: tuple[Tensor, list[tuple[ExactMatrix, Entries, Tensor, float]], torch.dtype],
    by_column: bool,
) -> None:
    w0, doras, dtype = case
    rows, columns = w0.shape
    base = entries(w0)
    dead = any(
        not math.isnan(magnitude[i])
        and all(x + y == 0 for x, y in zip(base[i], exact[i], strict=True))
        for _, exact, magnitude, _ in doras
        for i in range(rows)
    )
    stored = w0.T.contiguous() if by_column else w0
    values = [
        Dora(change.T if by_column else change, magnitude, weight, by_column)
        for change, _, magnitude, weight in doras
    ]
    rounder = CertifiedDora(values, [], lambda i, j: stored[i:j])
    if dead:
        with pytest.raises(NonFiniteValues, match="DoRA divides by"):
            rounder.add_to(stored, 0, dtype)
        return
    merged = rounder.add_to(stored, 0, dtype).values
    merged = merged.T.contiguous() if by_column else merged
    nothing = [[Fraction(0)] * columns for _ in range(rows)]
    expected = exact_dora(w0, [(e, m.tolist(), w) for _, e, m, w in doras], nothing, dtype)
    assert same_bits(merged, expected)


@pytest.mark.parametrize(("magnitude", "even"), [(257 / 256, 1.0), (259 / 256, 1.015625)])
def test_dora_on_a_rounding_boundary_goes_to_even(magnitude: float, even: float) -> None:
    """‖V‖ = 1, so the result is the magnitude, halfway between two bf16 values."""
    w0 = torch.tensor([[1.0, 0.0]]).bfloat16()
    zero = low_rank_matrix(LowRank(torch.zeros(1, 1), torch.zeros(1, 2)))
    dora = Dora(zero, torch.tensor([magnitude], dtype=torch.float64))
    block = CertifiedDora([dora], [], lambda i, j: w0[i:j]).add_to(w0, 0, torch.bfloat16)
    assert block.values.tolist() == [[even, 0.0]]
    assert block.level3 >= 1


def test_roots_that_cancel_are_seen_to_be_rational() -> None:
    two, eight = Fraction(2), Fraction(8)
    assert sum_of_roots(Fraction(3, 4), [(Fraction(1), two), (Fraction(-2), eight)]) == 0.75
    assert sum_of_roots(Fraction(0), [(Fraction(3), Fraction(9, 4))]) == 2.0
    irrational = sum_of_roots(Fraction(0), [(Fraction(1), two), (Fraction(1), Fraction(3))])
    assert irrational == pytest.approx(2**-0.5 + 3**-0.5, rel=1e-15)
    assert np.float64(irrational).view(np.int64) & 1  # rounded to odd


def test_dora_in_blocks_and_with_further_terms() -> None:
    torch.manual_seed(2)
    w0 = torch.randn(9, 6).bfloat16()
    b, a, magnitude = torch.randn(9, 2), torch.randn(2, 6), torch.rand(9).double() + 0.5
    change, extra = LowRank(b, a, 0.4), LowRank(torch.randn(9, 1), torch.randn(1, 6), 0.3)
    exact = [[Fraction(0.4) * x for x in row] for row in product(entries(b), entries(a))]
    more = [[Fraction(0.3) * x for x in row] for row in product(entries(extra.b), entries(extra.a))]
    rounder = CertifiedDora(
        [Dora(low_rank_matrix(change), magnitude, 0.7)],
        [low_rank_matrix(extra)],
        lambda i, j: w0[i:j],
        start=3,
    )
    merged = torch.cat(
        [
            rounder.add_to(w0[3:5], 0, torch.bfloat16).values,
            rounder.add_to(w0[5:], 2, torch.bfloat16).values,
        ]
    )
    expected = exact_dora(w0, [(exact, magnitude.tolist(), 0.7)], more, torch.bfloat16)
    assert same_bits(merged, expected[3:].contiguous())
