"""Updates side by side are the sum of their matrices, whatever their scales."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra.lowrank import LowRank
from loratool.algebra.stacking import at_scale, stacked

SCALES = st.floats(0.01, 100) | st.floats(-100, -0.01)


def low_rank(seed: int, rank: int, scale: float) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(7, rank, generator=generator)
    return LowRank(b, torch.randn(rank, 5, generator=generator), scale)


@given(st.integers(0, 99), st.integers(1, 4), SCALES, SCALES)
def test_another_scale_is_the_same_matrix(seed: int, rank: int, old: float, new: float) -> None:
    value = low_rank(seed, rank, old)
    changed = at_scale(value, new)
    assert changed.scale == new
    torch.testing.assert_close(changed.dense(), value.dense(), rtol=1e-5, atol=1e-5 * abs(old))


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4), SCALES, SCALES)
def test_stacked_is_the_sum(seed: int, rank: int, other: int, s: float, t: float) -> None:
    first, second = low_rank(seed, rank, s), low_rank(seed + 100, other, t)
    both = stacked(first, second)
    assert both.rank == rank + other
    assert both.scale == s
    assert torch.equal(both.b[:, :rank], first.b)
    assert torch.equal(both.a[:rank], first.a)
    expected = first.dense() + second.dense()
    torch.testing.assert_close(both.dense(), expected, rtol=1e-5, atol=1e-4 * (abs(s) + abs(t)))
