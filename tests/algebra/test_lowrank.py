"""Laws of the low-rank algebra, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra.lowrank import LowRank
from loratool.errors import ShapeMismatch


@st.composite
def low_ranks(draw: st.DrawFn, shape: tuple[int, int] | None = None) -> LowRank:
    rows, columns = shape or (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    rank = draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return LowRank(
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
        draw(st.sampled_from([1.0, 0.5, -2.0, 16 / 3])),
    )


@st.composite
def two_of_one_shape(draw: st.DrawFn) -> tuple[LowRank, LowRank]:
    first = draw(low_ranks())
    return first, draw(low_ranks(first.shape))


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(two_of_one_shape())
def test_sum_is_the_sum_of_the_dense_matrices(pair: tuple[LowRank, LowRank]) -> None:
    assert close((pair[0] + pair[1]).dense(), pair[0].dense() + pair[1].dense())


@settings(deadline=None)
@given(two_of_one_shape())
def test_inner_product(pair: tuple[LowRank, LowRank]) -> None:
    expected = (pair[0].dense() * pair[1].dense()).sum().item()
    assert pair[0].inner(pair[1]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(low_ranks(), st.floats(-3, 3))
def test_scaling_transposing_slicing(x: LowRank, factor: float) -> None:
    assert close((x * factor).dense(), factor * x.dense())
    assert close(x.T.dense(), x.dense().T)
    assert close(x.rows(0, 1).dense(), x.dense()[:1])


@settings(deadline=None)
@given(low_ranks())
def test_norm_and_spectrum_are_the_dense_ones(x: LowRank) -> None:
    dense = x.dense()
    values = torch.linalg.svdvals(dense)[: min(x.rank, *x.shape)]
    spectrum = x.spectrum()
    assert x.norm() == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-9)
    assert torch.allclose(spectrum.values[: len(values)], values, rtol=1e-8, atol=1e-8)
    assert spectrum.total_energy == pytest.approx(dense.square().sum().item(), rel=1e-9)


@settings(deadline=None)
@given(low_ranks(), st.integers(1, 8))
def test_truncation_is_optimal(x: LowRank, rank: int) -> None:
    u, s, vh = torch.linalg.svd(x.dense())
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] if rank < len(s) else x.dense()
    missed = torch.linalg.matrix_norm(x.dense() - x.truncate(rank).dense()).item()
    assert missed == pytest.approx(
        torch.linalg.matrix_norm(x.dense() - best).item(), rel=1e-6, abs=1e-8
    )
    assert x.truncate(rank).rank <= rank


def test_factors_that_do_not_chain_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="do not chain"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
    with pytest.raises(ShapeMismatch):
        LowRank(torch.zeros(3, 2), torch.zeros(2, 4)) + LowRank(
            torch.zeros(3, 2), torch.zeros(2, 5)
        )
