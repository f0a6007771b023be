"""Joint bases of several low-rank updates, in which each is a small matrix.

With Aᵢᵀ = Qᵢ·Rᵢ the stack [ΔW₁ … ΔW_N] is [s₁B₁R₁ᵀ | …]·blockdiag(Qᵢ)ᵀ, so that the left singular
vectors and the singular values of the (m, N·n) stack are those of an (m, R) matrix. They depend on
the updates alone, not on how each is split into B and A or where its scale is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.factorize import left_signs
from loratool.algebra.lowrank import LowRank

_EPSILON = 2.0**-52


@dataclass(frozen=True)
class Frame:
    """ΔWᵢ = u · coreᵢ · vᵀ exactly, with orthonormal u: (m, p) and v: (n, q); float64."""

    u: Tensor
    v: Tensor
    cores: tuple[Tensor, ...]

    def lift(self, core: Tensor) -> LowRank:
        """u · core · vᵀ for a (p, q) core."""
        return LowRank(self.u @ core.to(self.u), self.v.T)


def joint_frame(updates: Sequence[LowRank]) -> Frame:
    """The left singular vectors of [ΔW₁ … ΔW_N] and the right ones of [ΔW₁; …; ΔW_N].

    Numerically nonzero directions only, strongest first, the largest entry of each positive.
    Core space (Panariello et al. 2025, arXiv 2509.17786) takes the stacked factors' singular
    vectors instead, which span the same spaces.
    """
    u, _ = left_basis(updates)
    v, _ = left_basis([update.T for update in updates])
    cores = tuple((u.T @ x.b.double()) @ (x.a.double() @ v) * x.scale for x in updates)
    return Frame(u, v, cores)


def left_basis(updates: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Left singular vectors (m, k) and values (k,) of [ΔW₁ … ΔW_N], numerically nonzero ones."""
    parts = []
    for update in updates:
        r = torch.linalg.qr(update.a.double().T, mode="r").R
        parts.append(update.scale * (update.b.double() @ r.T))
    return _range(torch.cat(parts, dim=1))


def _range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    u = q @ left[:, : _count(values, matrix.shape)]
    return u * left_signs(u), values[: u.shape[1]]


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal factor P·Qᵀ of a tall matrix PΣQᵀ, nearest to it in the Frobenius norm.

    Of a matrix with dependent columns, the part on its range: a partial isometry.
    """
    q, r = torch.linalg.qr(matrix)
    p, values, qh = torch.linalg.svd(r, full_matrices=False)
    k = _count(values, matrix.shape)
    factor: Tensor = q @ (p[:, :k] @ qh[:k])
    return factor


def _count(values: Tensor, shape: torch.Size) -> int:
    top = float(values[0]) if len(values) else 0.0
    return int((values > max(shape) * _EPSILON * top).sum())


def common_subspaces(
    cores: Sequence[Tensor], rank: int, *, tolerance: float = 1e-6, steps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Orthonormal U (p, r), V (q, r) with the largest Σ‖UᵀXᵢV‖² found for matrices Xᵢ (p, q).

    Tucker decomposition of the first two modes of the stack: HOSVD to start, then alternating
    (HOOI; De Lathauwer, De Moor and Vandewalle, 2000) until the relative error
    moves by less than ``tolerance``.
    """
    stack = torch.stack(list(cores))
    total = float(stack.square().sum())
    u = _leading(list(stack), rank)
    v = _leading([core.T for core in stack], rank)
    before = None
    for _ in range(steps):
        u = _leading([core @ v for core in stack], rank)
        v = _leading([core.T @ u for core in stack], rank)
        kept = float((u.T @ stack @ v).square().sum())
        error = max(0.0, 1 - kept / total) ** 0.5 if total else 0.0
        if before is not None and abs(before - error) < tolerance:
            break
        before = error
    return u, v


def _leading(blocks: Sequence[Tensor], rank: int) -> Tensor:
    u: Tensor = torch.linalg.svd(torch.cat(list(blocks), dim=1), full_matrices=False).U
    return u[:, :rank]
