"""QR by Cholesky or Householder: the same triangle, whichever way it was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.thin_qr import ThinQR, thin_qr


def columns(n: int, sigma: list[float], seed: int) -> Tensor:
    """(n, k) with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(sigma), generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(len(sigma), len(sigma), generator=generator).double()).Q
    return u @ torch.diag(torch.tensor(sigma, dtype=torch.float64)) @ v.T


def check(matrix: Tensor, found: ThinQR, tolerance: float) -> None:
    k = found.r.shape[0]
    q = found.q_times(torch.eye(k, dtype=torch.float64))
    lengths = torch.linalg.vector_norm(matrix, dim=0).clamp(min=1e-300)
    assert float((q.T @ q - torch.eye(k)).norm()) < tolerance
    assert float(((q @ found.r - matrix) / lengths).norm()) < 1e-13
    assert not bool(found.r.tril(-1).any())


@pytest.mark.parametrize("condition", [0, 1, 3, 5, 7, 9, 12, 18])
def test_any_condition(condition: int) -> None:
    """From orthogonal to numerically deficient; all three ways are taken."""
    matrix = columns(300, [10 ** (-condition * i / 7) for i in range(8)], condition)
    check(matrix, thin_qr(matrix), 1e-10 if condition < 2 else 1e-13)


def test_which_way_is_taken() -> None:
    def way(condition: float) -> str:
        matrix = columns(300, [1.0, 1 / condition], 1)
        found = thin_qr(matrix)
        if found.mixing is None:
            return "householder"
        return "one round" if found.tall is matrix else "two rounds"

    assert [way(c) for c in (2, 1e5, 1e12)] == ["one round", "two rounds", "householder"]


@given(st.integers(0, 40), st.integers(0, 8), st.integers(0, 10**6), st.lists(st.integers(-40, 40)))
def test_any_shape_and_any_lengths(n: int, k: int, seed: int, powers: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator).double()
    for column, power in enumerate(powers[:k]):
        matrix[:, column] *= 2.0**power
    check(matrix, thin_qr(matrix), 1e-10)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_squares_beyond_float64(size: float) -> None:
    matrix = columns(50, [1.0, 0.5, 0.25], 3)
    found = thin_qr(matrix * size)
    check(matrix, replace(found, r=found.r / size), 1e-13)


def test_columns_of_zeros() -> None:
    matrix = columns(50, [1.0, 0.5, 0.25], 3)
    matrix[:, 1] = 0
    found = thin_qr(matrix)
    check(matrix, found, 1e-13)
    assert not bool(found.r[:, 1].any())


def test_singular_values_keep_their_digits() -> None:
    """Those of a product that Cholesky handles in one round: relative, also of the smallest."""
    sigma = [2.0**-i for i in range(6)]
    one, two = columns(200, sigma, 1), columns(160, sigma[::-1], 2)
    core = thin_qr(one).r @ thin_qr(two).r.T
    expected = torch.linalg.svdvals(one @ two.T)[:6]
    assert torch.allclose(torch.linalg.svdvals(core), expected, rtol=1e-9, atol=0)
