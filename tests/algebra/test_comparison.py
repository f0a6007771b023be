"""Measures through cores against dense float64 matrices, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratool.algebra.comparison import compare_jointly, compare_pair, linear_survival
from loratool.algebra.entrywise import read_entries, sign_agreement, ties_survival
from loratool.algebra.lowrank import LowRank
from loratool.algebra.subspaces import joint_dimension, phi_grid, principal_angles, row_basis
from tests.algebra.test_lowrank import low_ranks, two_of_one_shape

Pair = tuple[LowRank, LowRank]


def dense_svd(value: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Numerically nonzero triplets from the full matrix."""
    u, s, vh = torch.linalg.svd(value.dense(), full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum())
    return u[:, :k], s[:k], vh[:k].T


def column_projector(x: Tensor) -> Tensor:
    return x @ x.T


@given(low_ranks())
def test_svd_gives_the_matrix_back(x: LowRank) -> None:
    u, s, v = x.svd()
    assert torch.allclose((u * s) @ v.T, x.dense(), rtol=1e-9, atol=1e-9)
    assert len(s) == int(torch.linalg.matrix_rank(x.dense(), rtol=1e-10))
    for basis in (u, v):
        assert torch.allclose(basis.T @ basis, torch.eye(len(s), dtype=torch.float64), atol=1e-10)


@given(two_of_one_shape())
def test_pair_against_the_dense_matrices(pair: Pair) -> None:
    one, two = (value.dense() for value in pair)
    (u1, _, v1), (u2, _, v2) = map(dense_svd, pair)
    got = compare_pair(pair[0].svd(), pair[1].svd())
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    assert got.cosine == pytest.approx(cosine, abs=1e-9)
    assert got.first_energy == pytest.approx(float(one.square().sum()), rel=1e-9)
    inside = column_projector(u2) @ one @ column_projector(v2)
    assert got.first_in_second == pytest.approx(float(inside.square().sum()), rel=1e-8, abs=1e-9)
    inside = column_projector(u1) @ two @ column_projector(v1)
    assert got.second_in_first == pytest.approx(float(inside.square().sum()), rel=1e-8, abs=1e-9)
    for angles, x, y in ((got.angles_left, u1, u2), (got.angles_right, v1, v2)):
        cosines = torch.linalg.svdvals(x.T @ y).clamp(max=1)
        assert torch.allclose(angles.cos(), cosines, atol=1e-9)
        assert torch.all(angles.diff() >= -1e-12)
    whole = torch.linalg.matrix_norm(u1.T @ u2).square() / min(u1.shape[1], u2.shape[1])
    assert float(got.phi_left[-1, -1]) == pytest.approx(float(whole), abs=1e-9)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(values).Q


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_phi_is_its_definition(a: int, b: int, seed: int) -> None:
    x, y = orthonormal(10, a, seed), orthonormal(10, b, seed + 1)
    grid = phi_grid(x.T @ y)
    for i in range(1, a + 1):
        for j in range(1, b + 1):
            defined = torch.linalg.matrix_norm(x[:, :i].T @ y[:, :j]) ** 2 / min(i, j)
            assert float(grid[i - 1, j - 1]) == pytest.approx(float(defined), abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_a_plane_turned_by_an_angle(angle: float) -> None:
    """Small angles too: an arc cosine alone loses everything below 1e-8."""
    frame = orthonormal(12, 4, 3)
    turned = torch.stack(
        [
            frame[:, 0] * math.cos(angle) + frame[:, 2] * math.sin(angle),
            frame[:, 1] * math.cos(angle / 2) + frame[:, 3] * math.sin(angle / 2),
        ],
        dim=1,
    )
    got = principal_angles(frame[:, :2], turned)
    assert got.tolist() == pytest.approx([angle / 2, angle], rel=1e-6, abs=1e-15)


@given(low_ranks(), st.floats(0.01, 100))
def test_a_scaled_copy_is_the_same(x: LowRank, factor: float) -> None:
    got = compare_pair(x.svd(), (x * factor).svd())
    assert got.cosine == pytest.approx(1.0)
    assert got.first_in_second == pytest.approx(got.first_energy)
    assert got.second_energy == pytest.approx(factor**2 * got.first_energy)
    assert torch.all(got.angles_left < 1e-7)
    assert float(got.phi_right[-1, -1]) == pytest.approx(1.0)
    assert compare_pair(x.svd(), (x * -factor).svd()).cosine == pytest.approx(-1.0)


def test_orthogonal_updates_share_nothing() -> None:
    frame = orthonormal(9, 6, 1)
    x, y = LowRank(frame[:, :3], frame[:, :3].T), LowRank(frame[:, 3:], frame[:, 3:].T)
    got = compare_pair(x.svd(), y.svd())
    assert got.cosine == pytest.approx(0.0, abs=1e-12)
    assert got.angles_left.tolist() == pytest.approx([math.pi / 2] * 3)
    assert float(got.phi_left.max()) < 1e-12
    assert got.first_in_second == pytest.approx(0.0, abs=1e-12)


def test_an_update_of_zero_has_no_direction() -> None:
    zero = LowRank(torch.zeros(4, 2), torch.ones(2, 5))
    other = LowRank(torch.ones(4, 1), torch.ones(1, 5))
    got = compare_pair(zero.svd(), other.svd())
    assert got.cosine is None
    assert got.phi_left.shape == (0, 1)
    assert len(got.angles_left) == 0
    joint = compare_jointly([zero, zero], [zero.svd(), zero.svd()], 0.99)
    assert (joint.left, joint.effective_rank, joint.rank_for) == (0, 0.0, 0)


@given(two_of_one_shape())
def test_joint_figures_are_those_of_the_dense_sum(pair: Pair) -> None:
    got = compare_jointly(list(pair), [value.svd() for value in pair], 0.9)
    one, two = (value.dense() for value in pair)
    assert got.left == int(torch.linalg.matrix_rank(torch.cat([one, two], dim=1), rtol=1e-10))
    assert got.right == int(torch.linalg.matrix_rank(torch.cat([one, two], dim=0), rtol=1e-10))
    values = torch.linalg.svdvals(one + two)
    shares = values.square().cumsum(0) / values.square().sum()
    assert got.rank_for in range(
        int((shares < 0.9 - 1e-9).sum()) + 1, int((shares < 0.9 + 1e-9).sum()) + 2
    )


def test_a_negative_cancels_and_leaves_no_rank() -> None:
    x = LowRank(torch.randn(7, 3), torch.randn(3, 8), 0.7)
    joint = compare_jointly([x, x * -1], [x.svd(), x.svd()], 0.99)
    assert (joint.left, joint.right, joint.rank_for) == (3, 3, 0)
    inner = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) * x.norm() ** 2
    assert linear_survival(inner) == [0.0, 0.0]


def test_joint_dimension_counts_common_directions_once() -> None:
    frame = orthonormal(10, 6, 2)
    assert joint_dimension([frame[:, :4], frame[:, 2:6]]) == 6
    assert joint_dimension([frame[:, :4], frame[:, :2]]) == 4


def test_row_basis_is_that_of_an_svd() -> None:
    a = torch.randn(3, 11)
    vh = torch.linalg.svd(a.double(), full_matrices=False).Vh
    assert torch.allclose(
        (row_basis(a).T @ vh.T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-9
    )


# Entries ----------------------------------------------------------------------------------------


@given(two_of_one_shape())
def test_signs_of_all_entries(pair: Pair) -> None:
    entries = read_entries(pair, 10**6, "key")
    assert not entries.is_sample
    one, two = (value.dense() for value in pair)
    equal = (torch.sign(one) == torch.sign(two)) & (one != 0) & (two != 0)
    share = float(equal.sum() / ((one != 0) & (two != 0)).sum())
    assert sign_agreement(*entries.values) == pytest.approx(share)


def test_a_sample_is_whole_rows_and_repeatable() -> None:
    x = LowRank(torch.randn(50, 2), torch.randn(2, 10))
    first, second = (read_entries([x], 100, "key") for _ in range(2))
    assert (first.looked_at, first.total, first.is_sample) == (100, 500, True)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, read_entries([x], 100, "other").values)
    rows = {tuple(row) for row in x.dense().tolist()}
    assert all(tuple(row) in rows for row in first.values.reshape(10, 10).tolist())
    assert len({tuple(row) for row in first.values.reshape(10, 10).tolist()}) == 10


@given(st.integers(2, 4), st.integers(5, 60), st.integers(0, 999), st.sampled_from([0.1, 0.2, 0.5]))
def test_ties_is_the_papers_first_two_steps(n: int, count: int, seed: int, density: float) -> None:
    values = torch.randn(n, count, generator=torch.Generator().manual_seed(seed)).double()
    got = ties_survival(values, density)
    keep = max(1, round(density * count))
    trimmed = torch.zeros_like(values)
    for row in range(n):
        largest = sorted(range(count), key=lambda e: -abs(float(values[row, e])))[:keep]
        for e in largest:
            trimmed[row, e] = values[row, e]
    for row in range(n):
        survives = 0.0
        for e in range(count):
            total = float(trimmed[:, e].sum())
            if trimmed[row, e] != 0 and (trimmed[row, e] > 0) == (total > 0):
                survives += float(trimmed[row, e]) ** 2
        energy = float(values[row].square().sum())
        assert got.kept[row] == pytest.approx(float(trimmed[row].square().sum()) / energy)
        assert got.survives[row] == pytest.approx(survives / energy)


def test_opposite_updates_lose_everything_to_ties() -> None:
    x = torch.randn(1, 40, dtype=torch.float64)
    got = ties_survival(torch.cat([x, -x]), 0.2)
    assert got.survives == (0.0, 0.0)
    alike = ties_survival(torch.cat([x, x]), 0.2)
    assert alike.survives == alike.kept
    assert ties_survival(torch.zeros(2, 4, dtype=torch.float64), 0.5).survives == (None, None)
