"""Fitting DoRA: never worse than the LoRA it starts from, exact where a DoRA made the change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.dora_fit import dora_residual_norm, fit_dora, row_norms
from loratool.algebra.factorize import Factors, factorize
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule


def by_rank(rank: int) -> object:
    rule = parse_rank_rule(str(rank))

    def factorise(matrix: Tensor) -> Factors:
        return factorize(matrix, rule, key="k")

    return factorise


def base_and_update(seed: int, rank: int, relative: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(60, 45, generator=generator) * 0.02
    update = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 45, generator=generator)
    return w0, update * relative * w0.norm() / update.norm()


def dora_merged(w0: Tensor, value: LowRank, magnitude: Tensor) -> Tensor:
    """By the paper's equation, float64."""
    v = w0.double() + value.dense()
    return magnitude.double()[:, None] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.2])
def test_a_dora_is_found_again(spread: float) -> None:
    w0, update = base_and_update(1, 3, 0.1)
    generator = torch.Generator().manual_seed(5)
    magnitude = row_norms(w0) * (1 + spread * torch.randn(60, generator=generator)).abs()
    w = dora_merged(w0, LowRank(update, torch.eye(45)), magnitude).float()
    fit = fit_dora(w0, w, w - w0, by_rank(3))  # type: ignore[arg-type]
    assert fit is not None
    missed = dora_residual_norm(w0, w, fit.value, row_norms(w).float())
    lora = (w - w0 - fit.first.low_rank().dense()).norm().item()
    assert missed < 0.02 * (w - w0).norm()
    assert missed < 0.2 * lora or lora < 1e-4


@settings(max_examples=60)
@given(
    st.integers(0, 999),
    st.integers(1, 6),
    st.sampled_from([0.001, 0.05, 0.5]),
    st.sampled_from(["noise", "low rank", "scaled", "mixed"]),
)
def test_never_worse_than_lora_and_norms_are_exact(
    seed: int, rank: int, relative: float, kind: str
) -> None:
    w0, update = base_and_update(seed, 4, relative)
    noise = torch.randn(60, 45, generator=torch.Generator().manual_seed(seed + 1)) * 0.02
    d = {
        "noise": relative * noise,
        "low rank": update,
        "scaled": relative * w0 + update,
        "mixed": update + 0.3 * relative * noise,
    }[kind]
    w = w0 + d
    d = w - w0
    fit = fit_dora(w0, w, d, by_rank(rank))  # type: ignore[arg-type]
    assert fit is not None
    magnitude = row_norms(w).float()
    merged = dora_merged(w0, fit.value, magnitude)
    missed = dora_residual_norm(w0, w, fit.value, magnitude)
    true = (w.double() - merged).norm().item()
    assert missed == pytest.approx(true, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(merged.norm(dim=1), row_norms(w), rtol=1e-6, atol=0)
    lora = (d.double() - fit.first.low_rank().dense()).norm().item()
    rounding = 1e-6 * w.norm().item()
    assert missed <= lora * (1 + relative**2) + rounding


def test_rows_that_turned_away_and_rows_of_zeros() -> None:
    w0, update = base_and_update(3, 2, 0.1)
    w = w0 + update
    w[0] = -w0[0]
    w0[1] = 0
    fit = fit_dora(w0, w, w - w0, by_rank(6))  # type: ignore[arg-type]
    assert fit is not None
    merged = dora_merged(w0, fit.value, row_norms(w).float())
    assert bool(torch.isfinite(merged).all())
    assert (merged[0] - w[0]).norm() < 0.1 * w[0].norm()
    assert (merged[1] - w[1]).norm() < 0.1 * w[1].norm()
