"""Matrices by blocks of rows: order statistics and factorisation, against whole matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratool.algebra.counter import uniform
from loratool.algebra.factorize_rows import factorize_rows, residual_energy
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule
from loratool.algebra.row_blocks import RowBlocks, dense, magnitudes_at, map_rows

CPU = torch.device("cpu")


def by_rows(whole: torch.Tensor) -> RowBlocks:
    shape = (whole.shape[0], whole.shape[1])
    return RowBlocks(shape, CPU, lambda start, stop: whole[start:stop])


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32) | st.just(0.0) | st.just(1.0), min_size=1),
    st.data(),
)
def test_order_statistics_are_exact(values: list[float], data: st.DataObject) -> None:
    """Also with ties, zeros and subnormals."""
    whole = torch.tensor(values).reshape(-1, 1)
    positions = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    ordered = whole.abs().flatten().sort().values
    assert magnitudes_at(by_rows(whole), positions) == [float(ordered[p]) for p in positions]


def test_order_statistics_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.algebra.row_blocks.BLOCK_ELEMENTS", 100)
    whole = torch.randn(97, 13)
    ordered = whole.abs().flatten().sort().values
    assert magnitudes_at(by_rows(whole), [0, 700, 1260]) == ordered[[0, 700, 1260]].tolist()


def test_blocks_cover_the_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.algebra.row_blocks.BLOCK_ELEMENTS", 64)
    value = LowRank(torch.randn(50, 3), torch.randn(3, 20), 0.5)
    blocks = list(dense(value))
    assert [rows.start for rows, _ in blocks] == list(range(0, 50, 3))
    assert torch.allclose(torch.cat([block for _, block in blocks]).double(), value.dense())
    twice = map_rows([dense(value), dense(value)], lambda _, one, two: one + two)
    assert torch.equal(twice.held().rows(7, 9), 2 * dense(value).rows(7, 9))


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (700, 560), (560, 700), (1, 9)], ids=str)
@pytest.mark.parametrize("rule", ["8", "energy:0.9"])
def test_factors_are_as_good_as_the_best(
    shape: tuple[int, int], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below and above the side where the exact method ends, tall and wide."""
    monkeypatch.setattr("loratool.algebra.row_blocks.BLOCK_ELEMENTS", 10_000)
    generator = torch.Generator().manual_seed(3)
    small = min(shape)
    values = 0.8 ** torch.arange(small)
    u = torch.linalg.qr(torch.randn(shape[0], small, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(shape[1], small, generator=generator)).Q
    whole = (u * values) @ v.T
    factors = factorize_rows(by_rows(whole), parse_rank_rule(rule), key="k")
    sigma = torch.linalg.svdvals(whole.double())
    rank = factors.value.rank
    if rule == "8":
        assert rank == min(8, small)
    else:
        share = sigma.square().cumsum(0) / sigma.square().sum()
        assert rank == int((share < 0.9).sum()) + 1
    best = float(sigma[rank:].square().sum())
    missed = float((whole.double() - factors.value.dense()).square().sum())
    assert missed <= best * 1.001 + 1e-12
    assert residual_energy(by_rows(whole), factors.value) == pytest.approx(
        missed, rel=1e-9, abs=1e-15
    )
    assert factors.spectrum.norm == pytest.approx(float(whole.double().norm()), rel=1e-9)


def test_a_matrix_of_zeros_has_no_factors() -> None:
    assert (
        factorize_rows(by_rows(torch.zeros(600, 700)), parse_rank_rule("4"), key="k").value.rank
        == 0
    )


def test_uniform_numbers() -> None:
    whole = uniform(0, 300, 200, "key", CPU)
    assert torch.equal(uniform(17, 19, 200, "key", CPU), whole[17:19])
    assert 0 <= float(whole.min()) < 1e-3
    assert 1 - 1e-3 < float(whole.max()) < 1
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(whole.var()) == pytest.approx(1 / 12, rel=0.02)
    neighbours = torch.stack([whole[:, :-1].flatten(), whole[:, 1:].flatten()])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.02
    other = torch.stack([whole.flatten(), uniform(0, 300, 200, "yek", CPU).flatten()])
    assert abs(float(torch.corrcoef(other)[0, 1])) < 0.02
