"""Compiled sums and plain ones are the same bits, in the order that is stated."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.algebra.differences import DifferenceSums
from loratool.algebra.energies import column_squares, row_energies, row_squares, sum_of_squares
from loratool.algebra.native import SWITCH
from loratool.algebra.row_kernels import LANES, compare, squares
from tests.algebra.reference import same_bits

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, LANES - 1, LANES, LANES + 1, 3 * LANES + 5, 1000, 40_000]


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Of many magnitudes, subnormals of the dtype and zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    small = math.log2(torch.finfo(dtype).tiny) - 12
    powers = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * (12 - small)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    values *= torch.exp2(powers + small)
    values[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return values.to(dtype)


def stated(values: torch.Tensor) -> np.ndarray:
    """The sums over rows, spelled out."""
    rows, columns = values.shape
    lanes = np.zeros((rows, LANES))
    given = values.double().numpy()
    for column in range(columns):
        lanes[:, column % LANES] += given[:, column] * given[:, column]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    assert squares(torch.float32) is None


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_is_the_stated_one(columns: int, dtype: torch.dtype) -> None:
    values = matrix(5, columns, dtype, 1)
    assert np.array_equal(row_squares(values), stated(values))
    assert np.array_equal(row_energies(values), stated(values))
    if dtype == torch.float32:
        one_by_one = np.zeros(columns)
        for row in values.double().numpy():
            one_by_one += row * row
        assert np.array_equal(column_squares(values), one_by_one)


@pytest.mark.parametrize("columns", SIZES)
def test_the_order_of_differences_is_the_stated_one(columns: int) -> None:
    x = matrix(4, columns, torch.float32, 2)
    for y in (matrix(4, columns, torch.float32, 3), matrix(4, columns, torch.float64, 4)):
        assert np.array_equal(row_energies(x, minus=y), stated(x.double() - y.double()))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("columns", SIZES)
def test_so_is_the_order_without_compiled_loops(columns: int) -> None:
    test_the_order_of_differences_is_the_stated_one(columns)
    values = matrix(700, columns, torch.float64, 5)
    assert np.array_equal(row_energies(values), stated(values))
    assert np.array_equal(row_energies(values.float()), stated(values.float()))


def test_sums_do_not_depend_on_blocks_or_empty_ones() -> None:
    x = matrix(100, 70, torch.float32, 6)
    assert sum_of_squares(x) == math.fsum(stated(x))
    assert sum_of_squares(x.T) == sum_of_squares(x)
    assert sum_of_squares(x[:0]) == sum_of_squares(x[:, :0]) == 0.0
    assert sum_of_squares(torch.tensor([[math.inf, 1.0]])) == math.inf


def said(before: torch.Tensor, after: torch.Tensor, step: int) -> tuple[object, ...]:
    sums = DifferenceSums(before.shape[1], before.dtype, after.dtype)
    change, rough = torch.empty(before.shape), torch.empty(before.shape, dtype=torch.bfloat16)
    for start in range(0, len(before), step):
        rows = slice(start, start + step)
        assert sums.add(before[rows], after[rows], change[rows], rough[rows])
    assert same_bits(rough, change.bfloat16())
    bits = change.view(torch.int32).tolist()
    return sums.energy, sums.base_energy, sums.changed, sums.noise(), bits


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from(SIZES[:-1]),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.integers(1, 12),
    st.integers(0, 2**30),
)
def test_comparisons_are_the_same_bits(
    rows: int, columns: int, first: torch.dtype, second: torch.dtype, step: int, seed: int
) -> None:
    pytest.importorskip("llvmlite")
    before = matrix(rows, columns, first, seed)
    after = matrix(rows, columns, second, seed + 1)
    after[::2] = before[::2].to(second)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH, raising=False)
        assert compare(first, second) is not None
        compiled = said(before, after, step)
        patch.setenv(SWITCH, "1")
        assert compare(first, second) is None
        assert said(before, after, step) == compiled
    change = after.float() - before.float()
    assert compiled[0] == math.fsum(stated(change))
    assert compiled[1] == math.fsum(stated(before.float()))
    assert compiled[2] == int((change != 0).sum())


def test_every_float16_is_widened_exactly() -> None:
    """All of them, NaN and infinities too."""
    pytest.importorskip("llvmlite")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every.reshape(2, -1)
    change = torch.empty(every.shape)
    loop = compare(torch.float32, torch.float16)
    assert loop is not None
    sums, rough = np.empty((3, 2)), torch.empty(every.shape, dtype=torch.bfloat16)
    loop(torch.zeros(every.shape), every, change, rough, np.zeros(every.shape[1]), sums)
    numbers = ~every.isnan()
    assert same_bits(change[numbers] + 0.0, every.float()[numbers] + 0.0)
    assert bool(change[~numbers].isnan().all())


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 63), (2, 70)])
def test_what_is_not_finite_is_seen(
    bad: float, place: tuple[int, int], *, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setenv(SWITCH, "1")
    good = torch.ones(3, 71, dtype=torch.bfloat16)
    broken = good.clone()
    broken[place] = bad
    for before, after in ((good, broken), (broken, good), (broken, broken)):
        sums = DifferenceSums(71, torch.bfloat16, torch.bfloat16)
        assert not sums.add(before, after, torch.empty(3, 71))
