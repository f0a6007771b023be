"""Counts of a tensor's values against the same counts over the whole of it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.health import Health, HealthSums


def health_of(values: Tensor, step: int = 3) -> Health:
    sums = HealthSums()
    for start in range(0, values.shape[0], step):
        sums.add(values[start : start + step])
    return sums.health()


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -3.5, 65504.0, -65504.0]


@given(
    st.integers(2, 12).flatmap(
        lambda columns: st.lists(
            st.lists(st.sampled_from(SPECIAL), min_size=columns, max_size=columns),
            min_size=2,
            max_size=12,
        )
    ),
    st.integers(1, 5),
)
def test_counts_do_not_depend_on_blocks(rows: list[list[float]], step: int) -> None:
    values = torch.tensor(rows, dtype=torch.float16)
    wide = values.double()
    finite = torch.isfinite(wide)
    cleaned = torch.where(finite, wide, 0.0)
    health = health_of(values, step)
    assert health.elements == values.numel()
    assert health.nan == int(torch.isnan(wide).sum())
    assert health.infinite == int(torch.isinf(wide).sum())
    assert health.saturated == int((cleaned.abs() == 65504).sum())
    assert health.zero_rows == int((wide == 0).all(dim=1).sum())
    assert health.largest == float(cleaned.abs().max())
    assert float(cleaned[health.at].abs()) == health.largest
    expected = float((cleaned.square().sum() / max(1, int(finite.sum()))).sqrt())
    assert abs(health.rms - expected) <= 1e-12 * expected
    assert health.is_zero == (not bool((wide != 0).any()))
    assert health.constant == bool((wide == wide[0, 0]).all())


def test_outliers_are_far_from_the_rest() -> None:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert health_of(values).far is None
    assert health_of(values).far_rows == 0
    values[5, 7] = 60.0
    assert health_of(values).at == (5, 7)
    assert (health_of(values).far or 0) > 32
    values[9] *= 12
    values[10] = 0
    assert health_of(values).far_rows == 1
    assert health_of(values).zero_rows == 1


def test_every_float_dtype_has_its_own_largest_value() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64):
        top = torch.tensor([[torch.finfo(dtype).max, 1.0]], dtype=torch.float64).to(dtype)
        assert health_of(top).saturated == 1, dtype


def test_a_row_too_small_to_be_squared_is_not_zero() -> None:
    values = torch.full((4, 4), 1e-200, dtype=torch.float64)
    values[2] = 0
    assert health_of(values).zero_rows == 1
