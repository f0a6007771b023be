"""8-bit weights with scales: every result is the nearest stored value, by rational arithmetic."""

from __future__ import annotations

from bisect import bisect
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.certified_scaled import EIGHT_BITS, CertifiedScaled
from loratool.algebra.certified_terms import CertifiedTerms
from loratool.algebra.dora import CertifiedDora, Dora
from loratool.algebra.exact_matrix import low_rank_matrix
from loratool.algebra.lowrank import LowRank
from loratool.errors import NonFiniteValues, UnsupportedInput

KINDS = pytest.mark.parametrize("dtype", EIGHT_BITS)


@cache
def codes_of(dtype: torch.dtype) -> list[tuple[Fraction, int]]:
    """Every finite value with its code, in order; zero once, as 0."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = [(Fraction(float(v)), i) for i, v in enumerate(values) if torch.isfinite(v)]
    return sorted(pair for pair in finite if pair[1] != 128)


def nearest(target: Fraction, scale: float, before: int, dtype: torch.dtype) -> int:
    """The code nearest to target/scale, ties to even; a zero that is exact keeps its sign."""
    finite = codes_of(dtype)
    wanted = target / Fraction(scale)
    near = bisect(finite, (wanted, 0))
    close = finite[max(0, near - 2) : near + 2]
    least = min(abs(value - wanted) for value, _ in close)
    tied = [code for value, code in close if abs(value - wanted) == least]
    code = next((code for code in tied if code % 2 == 0), tied[0])
    if code == 0 and target == 0 and before & 0x7F == 0:
        return before
    return 128 if code == 0 and target < 0 else code


def check(q: Tensor, scales: Tensor, value: LowRank) -> None:
    grid = scales.double().expand(q.shape)
    rounder = CertifiedScaled(CertifiedTerms([low_rank_matrix(value)]), lambda i, j: grid[i:j])
    block = rounder.add_to(q, 0, q.dtype)
    got = block.values.view(torch.uint8)
    before = q.view(torch.uint8)
    b, a, s = value.b.double(), value.a.double(), Fraction(value.scale)
    second, top = (value for value, _ in codes_of(q.dtype)[-2:])
    beyond = 0
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            scale = float(grid[i, j])
            delta = sum(
                (Fraction(float(b[i, k])) * Fraction(float(a[k, j])) for k in range(b.shape[1])),
                Fraction(0),
            )
            target = Fraction(float(q[i, j].double())) * Fraction(scale) + s * delta
            over = abs(target) / Fraction(scale) - (top + (top - second) / 2)
            beyond += over > 0 or (over == 0 and q.dtype == torch.float8_e5m2)
            assert got[i, j] == nearest(target, scale, int(before[i, j]), q.dtype), (i, j)
    assert block.overflowed == beyond
    assert block.changed == int((got != before).sum())


@KINDS
def test_random_updates_of_all_sizes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 256, (6, 40), generator=generator, dtype=torch.uint8).view(dtype)
    q = torch.where(torch.isfinite(q.float()), q.float(), torch.zeros(())).to(dtype)
    scales = torch.rand(6, 1, generator=generator) * 0.01 + 1e-4
    for size in (1e-6, 1e-2, 10.0):
        b = torch.randn(6, 3, generator=generator) * size
        a = torch.randn(3, 40, generator=generator)
        check(q, scales, LowRank(b, a, 2 / 3))


@KINDS
def test_exact_ties_near_ties_and_zeros(dtype: torch.dtype) -> None:
    """Updates of exactly half a step, beside it by the least that float32 can, and none at all."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = every[torch.isfinite(every.float())]
    ordered = sorted({float(v) for v in every.double()})
    middles = [(x + y) / 2 for x, y in pairwise(ordered)]
    starts = [float(v) for v in ordered[:-1]]
    s = 0.375
    exact = torch.tensor([(m - v) * s for m, v in zip(middles, starts, strict=True)])
    rows = torch.tensor(starts)[None].to(dtype).expand(3, -1).contiguous()
    factors = torch.tensor([[1.0], [1 + 2.0**-20], [1 - 2.0**-20]])
    check(rows, torch.full((1, 1), s), LowRank(factors, exact[None].float(), 1.0))
    zeros = torch.tensor([[0, 128, 1, 129]], dtype=torch.uint8).view(dtype)
    for step in (0.0, 1e-30, -1e-30):
        check(zeros, torch.ones(1, 1), LowRank(torch.tensor([[step]]), torch.ones(1, 4), 1.0))
    cancelling = LowRank(torch.tensor([[1.0, -1.0]]), torch.full((2, 4), 0.3), 1.0)
    check(zeros, torch.ones(1, 1), cancelling)


@KINDS
def test_beyond_the_range(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    q = torch.tensor([[top, -top, top, -top]]).to(dtype)
    step = 32.0 if dtype == EIGHT_BITS[0] else 8192.0
    a = torch.tensor([[0.5, -0.5, 0.75, -0.75]]) * step
    check(q, torch.full((1, 1), 0.25), LowRank(torch.tensor([[0.25]]), a, 1.0))


@given(st.integers(0, 2**32 - 1))
def test_any(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = EIGHT_BITS[seed % 2]
    q = torch.randn(2, 3, generator=generator).to(dtype)
    scales = 2.0 ** torch.randint(-20, 5, (2, 3), generator=generator).double()
    b = (torch.randn(2, 2, generator=generator) * 0.1).bfloat16()
    check(q, scales, LowRank(b, torch.randn(2, 3, generator=generator).bfloat16(), 16 / 3))


def test_refusals() -> None:
    value = low_rank_matrix(LowRank(torch.ones(1, 1), torch.ones(1, 1), 1.0))
    q = torch.ones(1, 1).to(torch.float8_e4m3fn)
    for bad in (0.0, -1.0, float("nan")):
        scales = torch.full((1, 1), bad).double()
        with pytest.raises(UnsupportedInput, match="a scale is"):
            CertifiedScaled(CertifiedTerms([value]), lambda i, j, s=scales: s).add_to(q, 0, q.dtype)
    nan = torch.tensor([[127]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(NonFiniteValues):
        CertifiedScaled(CertifiedTerms([value]), lambda i, j: torch.ones(1, 1).double()).add_to(
            nan, 0, q.dtype
        )


def nearest_root(numerator: Fraction, square: Fraction, scale: float, dtype: torch.dtype) -> int:
    """The code nearest to numerator/√square/scale, which is no boundary, by exact comparison."""
    sign = -1 if numerator < 0 else 1
    finite = [(value, code) for value, code in codes_of(dtype) if value * sign >= 0]
    ordered = sorted(finite, key=lambda pair: abs(pair[0]))
    code = ordered[0][1]
    for (low, _), (high, above) in pairwise(ordered):
        boundary = abs(low + high) / 2 * Fraction(scale)
        if numerator**2 < boundary**2 * square:
            break
        code = above
    return 128 if code == 0 and sign < 0 else code


@KINDS
@pytest.mark.parametrize("by_column", [False, True])
def test_dora_of_scaled_weights(dtype: torch.dtype, by_column: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(5, 7, generator=generator).to(dtype)
    scales = (torch.rand(5, 1, generator=generator) * 0.1 + 0.01).double().expand(5, 7)
    b, a = torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator) * 0.05
    lines = 7 if by_column else 5
    magnitude = torch.rand(lines, generator=generator).double().float().double() * 0.2
    dora = Dora(low_rank_matrix(LowRank(b, a, 0.3)), magnitude, by_column=by_column)

    def read_rows(i: int, j: int) -> Tensor:
        return q[i:j].double() * scales[i:j]

    rounder = CertifiedScaled(CertifiedDora([dora], [], read_rows), lambda i, j: scales[i:j])
    got = torch.cat([rounder.add_to(q[i : i + 2], i, dtype).values for i in (0, 2, 4)]).view(
        torch.uint8
    )
    v = [
        [
            Fraction(float(q[i, j].double())) * Fraction(float(scales[i, j]))
            + Fraction(0.3)
            * sum(Fraction(float(b[i, k])) * Fraction(float(a[k, j])) for k in range(2))
            for j in range(7)
        ]
        for i in range(5)
    ]
    for i in range(5):
        for j in range(7):
            line = [row[j] for row in v] if by_column else v[i]
            square = sum((x * x for x in line), Fraction(0))
            m = Fraction(float(magnitude[j if by_column else i]))
            assert got[i, j] == nearest_root(m * v[i][j], square, float(scales[i, j]), dtype)
