"""Intruder dimensions against full decompositions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.intruders import STEPS, examine, largest_cosine_at_most, leading


def by_hand(base: Tensor, tuned: Tensor, top: int) -> np.ndarray:
    """The largest |cos| of each leading left vector to any of the base's: Algorithm 1."""
    known = np.linalg.svd(base.double().numpy(), full_matrices=False)[0]
    found = np.linalg.svd(tuned.double().numpy(), full_matrices=False)[0]
    cosines: np.ndarray = np.abs(found.T @ known).max(axis=1)[:top]
    return cosines


def decaying(rows: int, columns: int, power: float, seed: int) -> Tensor:
    """Singular values i^−power."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator)).Q
    matrix: Tensor = (left * torch.arange(1, side + 1).pow(-power)) @ right.T
    return matrix


def planted(base: Tensor, sizes: list[float], seed: int) -> Tensor:
    """The base with random directions of these sizes added."""
    generator = torch.Generator().manual_seed(seed)
    tuned = base.clone()
    for size in sizes:
        x = torch.randn(base.shape[0], generator=generator)
        y = torch.randn(base.shape[1], generator=generator)
        tuned += size * torch.outer(x / x.norm(), y / y.norm())
    return tuned


@settings(max_examples=40)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(1, 12),
    st.sampled_from([0.3, 0.5, 0.9]),
    st.integers(0, 100),
)
def test_small_matrices(rows: int, columns: int, top: int, epsilon: float, seed: int) -> None:
    base = decaying(rows, columns, 0.7, seed)
    tuned = planted(base, [1.5, 0.6], seed)
    found = examine(base, tuned, top=top, epsilon=epsilon, key="k")
    expected = by_hand(base, tuned, top)
    assert found.exact
    assert len(found.cosines) == len(expected) == min(top, rows, columns)
    assert found.cosines.numpy() == pytest.approx(expected, abs=1e-4)
    sure = np.abs(expected - epsilon) > 1e-3
    assert (found.intruders.numpy() == (expected < epsilon))[sure].all()
    assert found.base_value == pytest.approx(float(torch.linalg.matrix_norm(base, 2)), rel=1e-5)


@pytest.mark.parametrize("shape", [(900, 700), (700, 900), (800, 800)])
def test_large_matrices_are_certified_without_decomposing_them(shape: tuple[int, int]) -> None:
    base = decaying(*shape, 0.5, 1)
    tuned = planted(base, [1.5, 0.8, 0.6, 0.3], 2)
    found = examine(base, tuned, top=10, epsilon=0.5, key="k")
    expected = by_hand(base, tuned, 10)
    assert not found.exact
    assert found.intruders.tolist() == (expected < 0.5).tolist()
    assert 2 <= int(found.intruders.sum()) <= 4
    assert (found.at_most.numpy() >= expected - 1e-6).all()
    assert (found.at_most[found.intruders] < 0.5).all()
    old = ~found.intruders.numpy()
    assert found.cosines.numpy()[old] == pytest.approx(expected[old], abs=5e-3)
    again = examine(base, tuned, top=10, epsilon=0.5, key="k", exact=True)
    assert again.exact
    assert again.intruders.tolist() == found.intruders.tolist()
    values = torch.linalg.svdvals(tuned.double())[:10]
    assert found.triplets.values.numpy() == pytest.approx(values.numpy(), rel=1e-5)
    one, other = found.part(), again.part()
    assert one is not None
    assert other is not None
    assert float((one.dense() - other.dense()).norm()) <= 4e-3 * other.norm()


def test_what_is_not_certain_is_decomposed() -> None:
    """Of pure noise, leading directions are not settled by a few passes."""
    base = torch.randn(640, 640, generator=torch.Generator().manual_seed(0))
    tuned = planted(base, [80.0], 1)
    found = examine(base, tuned, top=10, epsilon=0.5, key="k")
    expected = by_hand(base, tuned, 10)
    assert found.exact
    sure = np.abs(expected - 0.5) > 1e-3
    assert (found.intruders.numpy() == (expected < 0.5))[sure].all()


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([(60, 40), (40, 60), (50, 50)]))
def test_no_cosine_exceeds_its_bound(seed: int, shape: tuple[int, int]) -> None:
    """Random starts, and starts that are, or lean towards, a singular vector."""
    base = decaying(*shape, 0.3 + seed % 3 * 0.4, seed)
    u = torch.linalg.svd(base.double(), full_matrices=False).U
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape[0], 3, generator=generator).double()
    noise /= noise.norm(dim=0)
    starts = torch.stack([noise[:, 0], u[:, seed % 40], 0.6 * u[:, 3] + 0.8 * noise[:, 1]], dim=1)
    bound = largest_cosine_at_most(base, starts, torch.zeros(3).double())
    true = (u.T @ starts).abs().max(dim=0).values
    assert (bound >= true * (1 - 1e-6)).all()


def test_the_bound_falls_with_the_steps() -> None:
    """Of a spread-out vector; that is what makes it useful."""
    base = decaying(500, 500, 0.3, 0)
    start = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).double()
    start /= start.norm()
    assert float(largest_cosine_at_most(base, start, torch.zeros(1).double())) < 0.3
    early = float(largest_cosine_at_most(base, start, torch.full((1,), 2.0).double()))
    assert early > float(largest_cosine_at_most(base, start, torch.zeros(1).double()))
    assert STEPS[0] < STEPS[-1]


def test_the_stated_sines_hold() -> None:
    base = decaying(700, 600, 0.8, 5)
    found = leading(base, 12, "k")
    u, _, vh = torch.linalg.svd(base.double(), full_matrices=False)
    for ours, theirs in ((found.u, u), (found.v, vh.T)):
        cosines = (ours.double() * theirs[:, :12]).sum(dim=0).abs().clamp(max=1)
        sines = (1 - cosines.square()).clamp(min=0).sqrt()
        assert (sines <= found.sines + 1e-4).all()


def test_nothing_new() -> None:
    base = decaying(30, 20, 0.5, 0)
    found = examine(base, base * 1.5, top=10, epsilon=0.5, key="k")
    assert not bool(found.intruders.any())
    assert found.part() is None
    zero = examine(torch.zeros(30, 20), base, top=10, epsilon=0.5, key="k")
    assert bool(zero.intruders.all()), "a base of zeros has no direction at all"
