"""QR of tall matrices, by Cholesky where that is as good and many times faster.

MᵀM = RᵀR gives R with a relative error of about κ²·2⁻⁵², κ being the condition number of M with its
columns scaled to one length (van der Sluis, 1969). Where κ is small that is all; a second round on
M·R⁻¹ (CholeskyQR2: Yamamoto et al., 2015) reaches full accuracy as long as the first left the
columns nearly orthogonal, which is looked at; everything else, deficient matrices among it, goes to
Householder's method, with the columns brought to about one length by powers of two. The result is
therefore accurate column by column, however much their lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPSILON = 2.0**-52
_ONE_ROUND = 1e-10
"""Bound on the relative error of R up to which one round is enough."""
_TALL = 4
"""Rows per column from which on Cholesky pays."""


@dataclass(frozen=True)
class ThinQR:
    """M = Q·R with r: (k', k), k' = min(n, k). Q = ``tall`` · ``mixing``⁻¹, or ``tall`` itself."""

    r: Tensor
    tall: Tensor
    mixing: Tensor | None = None

    def q_times(self, u: Tensor) -> Tensor:
        """Q @ u, without building Q. u: (k', any)."""
        if self.mixing is not None:
            u = torch.linalg.solve_triangular(self.mixing, u, upper=True)
        product: Tensor = self.tall @ u
        return product


def thin_qr(matrix: Tensor) -> ThinQR:
    """QR of a float64 matrix (n, k). R's diagonal may have either sign."""
    if matrix.shape[0] >= _TALL * matrix.shape[1] > 0:
        found = _by_cholesky(matrix)
        if found is not None:
            return found
    lengths = torch.linalg.vector_norm(matrix, dim=0)
    usable = (lengths > 0) & torch.isfinite(lengths)
    factor = torch.exp2(-torch.where(usable, lengths, 1.0).log2().round())
    q, r = torch.linalg.qr(matrix * factor)
    return ThinQR(r / factor, q)


def _by_cholesky(matrix: Tensor) -> ThinQR | None:
    first = _cholesky(matrix.T @ matrix)
    if first is None:
        return None
    if _error_bound(first) <= _ONE_ROUND:
        return ThinQR(first, matrix, first)
    nearly = torch.linalg.solve_triangular(first, matrix, upper=True, left=False)
    products = nearly.T @ nearly
    off = products - torch.eye(len(products), dtype=products.dtype, device=products.device)
    if not float(off.norm()) < 0.5:
        return None
    second = _cholesky(products)
    return None if second is None else ThinQR(second @ first, nearly, second)


def _cholesky(products: Tensor) -> Tensor | None:
    r, info = torch.linalg.cholesky_ex(products, upper=True)
    return None if int(info) or not bool(torch.isfinite(r).all()) else r


def _error_bound(r: Tensor) -> float:
    """k·κ²·2⁻⁵², with κ ≤ √k·‖(R·D⁻¹)⁻¹‖_F for the columns' lengths D."""
    scaled = r / torch.linalg.vector_norm(r, dim=0)
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(scaled, eye, upper=True)
    return len(r) * float(inverse.square().sum()) * _EPSILON
