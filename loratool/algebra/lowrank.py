"""The value every adapter is made of: ΔW = scale · B · A, with its algebra.

All of it goes through the small core: with B = Q_B R_B and Aᵀ = Q_A R_A (thin QR, float64),
ΔW = Q_B (scale · R_B R_Aᵀ) Q_Aᵀ, so norms, singular values and truncations cost O((m+n) r²) and
never build the (out, in) matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.algebra.spectrum import Spectrum
from loratool.algebra.thin_qr import ThinQR, thin_qr
from loratool.errors import ShapeMismatch


class ThinSvd(NamedTuple):
    """U·diag(values)·Vᵀ with u: (out, k), values: (k,) descending, v: (in, k), all float64."""

    u: Tensor
    values: Tensor
    v: Tensor


@dataclass(frozen=True)
class LowRank:
    """The update ΔW = scale · b @ a.

    b: (out, r), a: (r, in); any float dtype, same device. The scale is part of the value: no
    other code multiplies by alpha. Raises ShapeMismatch when b and a do not chain.
    """

    b: Tensor
    a: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise ShapeMismatch(
                f"factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)} do not chain"
            )
        if not math.isfinite(self.scale):
            raise ShapeMismatch(f"scale {self.scale} is not a finite number")

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of b: an upper bound of the matrix's rank."""
        return self.b.shape[1]

    @property
    def T(self) -> LowRank:  # noqa: N802  (the field's own name)
        """The transposed update, as a Conv1D weight of shape (in, out) needs it."""
        return LowRank(self.a.T, self.b.T, self.scale)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.b, self.a, self.scale * factor)

    def __add__(self, other: LowRank) -> LowRank:
        """Exact sum up to the rounding of the scales into float64 factors; rank r₁ + r₂.

        Raises ShapeMismatch.
        """
        if self.shape != other.shape:
            raise ShapeMismatch(f"cannot add updates of shapes {self.shape} and {other.shape}")
        b = torch.cat([self.b.double() * self.scale, other.b.double() * other.scale], dim=1)
        return LowRank(b, torch.cat([self.a.double(), other.a.double()], dim=0))

    def rows(self, start: int, stop: int) -> LowRank:
        """The update of rows ``start:stop`` only."""
        return LowRank(self.b[start:stop], self.a, self.scale)

    def dense(self) -> Tensor:
        """The (out, in) matrix in float64. For small matrices and tests."""
        return self.scale * (self.b.double() @ self.a.double())

    def _core(self) -> tuple[ThinQR, Tensor, ThinQR]:
        left, right = thin_qr(self.b.double()), thin_qr(self.a.double().T)
        return left, self.scale * (left.r @ right.r.T), right

    def spectrum(self) -> Spectrum:
        """All min(r, out, in) possibly nonzero singular values, float64."""
        _, core, _ = self._core()
        values = torch.linalg.svdvals(core)
        return Spectrum(values.cpu(), float(values.square().sum()), self.shape)

    def norm(self) -> float:
        """‖ΔW‖_F."""
        _, core, _ = self._core()
        return float(torch.linalg.matrix_norm(core))

    def inner(self, other: LowRank) -> float:
        """⟨ΔW₁, ΔW₂⟩ = trace(ΔW₁ᵀ ΔW₂). Raises ShapeMismatch."""
        if self.shape != other.shape:
            raise ShapeMismatch(f"no inner product of shapes {self.shape} and {other.shape}")
        left = self.b.double().T @ other.b.double()
        right = other.a.double() @ self.a.double().T
        return float(self.scale * other.scale * (left * right.T).sum())

    def svd(self) -> ThinSvd:
        """The numerically nonzero singular triplets: σ > max(out, in)·2⁻⁵²·σ₁."""
        left, core, right = self._core()
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        top = float(sigma[0]) if len(sigma) else 0.0
        k = int((sigma > max(self.shape) * 2.0**-52 * top).sum())
        return ThinSvd(left.q_times(u[:, :k]), sigma[:k], right.q_times(vh[:k].T))

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of at most this rank (Eckart–Young), float64, balanced."""
        left, core, right = self._core()
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
        root = sigma[:rank].sqrt()
        b, a = left.q_times(u[:, :rank]), right.q_times(vh[:rank].T)
        return LowRank(b * root, root[:, None] * a.T)
