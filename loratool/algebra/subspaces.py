"""How the subspaces of two updates lie to each other.

Everything follows from the singular vectors of both (``LowRank.svd``) and their small matrices of
inner products; the (out, in) matrices are never built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loratool.algebra.blocks import float64_blocks


def principal_angles(x: Tensor, y: Tensor) -> Tensor:
    """Angles between the spans of two orthonormal bases, radians, ascending, float64.

    x: (n, i), y: (n, j); min(i, j) angles. Each comes from its sine below π/4 and from its cosine
    above, so that small ones are as accurate as large ones (Björck and Golub, 1973; Knyazev and
    Argentati, 2002, Algorithm 3.1).
    """
    if x.shape[1] < y.shape[1]:
        x, y = y, x
    if y.shape[1] == 0:
        return torch.zeros(0, dtype=torch.float64)
    overlap = x.T @ y
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(y - x @ overlap).clamp(max=1.0).flip(0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def phi_grid(overlap: Tensor) -> Tensor:
    """φ(i, j) = ‖X_iᵀY_j‖²_F / min(i, j) for the first i and j vectors of two orthonormal bases.

    overlap: XᵀY, (a, b). Result (a, b): entry [i−1, j−1] is φ(i, j), between 0 (orthogonal) and 1
    (the smaller span lies in the larger). Hu et al. (2022), §7.2.
    """
    sums = overlap.square().cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, dtype=torch.float64)[:, None]
    j = torch.arange(1, overlap.shape[1] + 1, dtype=torch.float64)[None, :]
    return (sums / torch.minimum(i, j)).clamp(max=1.0)


def phi_expected(i: int, j: int, dimension: int) -> float:
    """The mean of φ(i, j) for unrelated spans in ``dimension`` dimensions: max(i, j)/dimension."""
    return min(1.0, max(i, j) / dimension)


def joint_dimension(bases: list[Tensor]) -> int:
    """Dimension of the sum of the spans of orthonormal bases (n, k_i).

    Numerical: singular values of the stacked bases above max(n, Σk)·2⁻⁵² times the largest.
    """
    stacked = torch.cat(bases, dim=1)
    if stacked.shape[1] == 0:
        return 0
    values = torch.linalg.svdvals(torch.linalg.qr(stacked, mode="r").R)
    return int((values > max(stacked.shape) * 2.0**-52 * values[0]).sum())


def row_basis(factor: Tensor) -> Tensor:
    """The right singular vectors (in, k) of an A factor (r, in), largest singular value first."""
    q, r = torch.linalg.qr(factor.double().T)
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    top = float(values[0]) if len(values) else 0.0
    k = int((values > max(factor.shape) * 2.0**-52 * top).sum())
    basis: Tensor = q @ u[:, :k]
    return basis


def degrees(angles: Tensor) -> list[float]:
    """Radians to degrees."""
    return [math.degrees(angle) for angle in angles.tolist()]


def projected_norm(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """‖Uᵀ·M·V‖_F: what a matrix (m, n) has in the directions U (m, k), V (n, k). In float64.

    Hu et al. (2022), §7.3, the denominator of the amplification factor.
    """
    inside = torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64, device=matrix.device)
    for start, block in float64_blocks(matrix):
        inside += u[start : start + len(block)].T @ (block @ v)
    return float(torch.linalg.matrix_norm(inside))


def projected_norm_by_chance(norm: float, k: int, shape: tuple[int, int]) -> float:
    """Root mean square of ‖Uᵀ·M·V‖_F over random k-dimensional U and V: ‖M‖_F · k / √(m·n).

    E[U·Uᵀ] = (k/m)·I and E[V·Vᵀ] = (k/n)·I for uniform subspaces.
    """
    return norm * k / math.sqrt(shape[0] * shape[1])
