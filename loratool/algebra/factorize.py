"""The best low-rank approximation of a dense difference, exactly or by a randomised method.

Small matrices: eigenvectors of the float64 Gram matrix of the smaller side. Large ones: block
Krylov iteration (Musco and Musco, 2015, Algorithm 2) on a Gaussian start block (Halko, Martinsson
and Tropp, 2011), whose sketch grows until the rank rule is satisfied. Products run in float32,
norms and small eigenproblems in float64.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankRule
from loratool.algebra.spectrum import Spectrum

EXACT_SIDE = 512
"""Up to this smaller side the Gram matrix is cheaper than a sketch."""

OVERSAMPLING = 8
KRYLOV_STEPS = 2
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Factors:
    """The leading part of D's singular value decomposition.

    u: (m, k) and v: (n, k) with orthonormal columns, float32. spectrum: every value that was
    resolved (k or more), with D's total energy.
    """

    u: Tensor
    v: Tensor
    spectrum: Spectrum
    method: str

    def low_rank(self) -> LowRank:
        """The balanced update (U·√Σ)(√Σ·Vᵀ), scale 1, float32."""
        rank = self.u.shape[1]
        root = self.spectrum.values[:rank].sqrt().to(self.u)
        return LowRank(self.u * root, (self.v * root).T)


def factorize(d: Tensor, rule: RankRule, *, key: str, exact: bool = False) -> Factors:
    """The components of ``d`` that ``rule`` keeps.

    d: (m, n) float32, on any device, finite. ``key`` (a seed and the tensor's name) determines
    the random start block, so that results do not depend on the order of the work. ``exact``
    forbids the randomised method. The sign of each pair is fixed: the entry of the left vector
    with the largest magnitude is positive.
    """
    if d.shape[0] < d.shape[1]:
        mirrored = factorize(d.T, rule, key=key, exact=exact)
        spectrum = Spectrum(
            mirrored.spectrum.values, mirrored.spectrum.total_energy, (d.shape[0], d.shape[1])
        )
        return _with_fixed_signs(mirrored.v, mirrored.u, spectrum, mirrored.method)
    energy = sum_of_squares(d)
    side = d.shape[1]
    guess = rule.first_guess((d.shape[0], side))
    if not exact:
        while side > EXACT_SIDE and (guess + OVERSAMPLING) * (KRYLOV_STEPS + 1) <= side // 2:
            u, values, v = _block_krylov(d, guess + OVERSAMPLING, key)
            spectrum = Spectrum(values[:guess], energy, (d.shape[0], side))
            rank = rule(spectrum)
            if rank is not None:
                return _with_fixed_signs(u[:, :rank], v[:, :rank], spectrum, "block Krylov")
            guess *= 2
    v, values = _gram_eigenvectors(d)
    spectrum = Spectrum(values, energy, (d.shape[0], side))
    rank = rule(spectrum)
    assert rank is not None, "a complete spectrum decides every rule"
    return _with_fixed_signs(
        *_left_from_right(d, v[:, :rank], values[:rank]), spectrum, "exact (Gram)"
    )


def identity_factors(d: Tensor) -> LowRank:
    """``d`` itself as B·A with the identity on its smaller side: full rank, without any error.

    An SVD's factors, rounded to float32, would miss each entry by about 2⁻²⁴ of its row's norm,
    which is many units in the last place of an entry that is small for its row.
    """
    rows, columns = d.shape
    identity = torch.eye(min(rows, columns), dtype=d.dtype, device=d.device)
    return LowRank(d, identity) if rows >= columns else LowRank(identity, d)


def sum_of_squares(d: Tensor) -> float:
    """‖d‖²_F with the squares and their sum in float64, block by block."""
    return sum(
        float(block.double().square().sum()) for block in torch.split(d, block_rows(d.shape[1]))
    )


def residual_norm(d: Tensor, update: LowRank) -> float:
    """‖D − s·B·A‖_F with the factors as stored: products and sums in float64, block by block."""
    step = block_rows(d.shape[1])
    a = update.a.double() * update.scale
    b = update.b.double()
    total = 0.0
    for start in range(0, d.shape[0], step):
        block = d[start : start + step].double()
        total += float(block.sub_(b[start : start + step] @ a).square_().sum())
    return float(total**0.5)


def block_rows(columns: int) -> int:
    """Rows per block such that a float64 block stays in cache."""
    return max(16, _BLOCK_BYTES // (8 * max(columns, 1)))


def _gram_eigenvectors(d: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (n, n) and all singular values of a tall matrix, descending."""
    gram = torch.zeros(d.shape[1], d.shape[1], dtype=torch.float64, device=d.device)
    for block in torch.split(d, block_rows(d.shape[1])):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    return vectors.flip(1), values.cpu()


def _left_from_right(d: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """u = D·v/σ in float64 where σ is resolved by a Gram matrix; elsewhere D·v is kept as it is.

    Below about 1e-8·σ₁ the Gram matrix's eigenvalues are noise. There the product u·σ·vᵀ matters
    and not u's length: σ is replaced by ‖D·v‖ by the caller's spectrum only where it is sound, so
    u is normalised with the same σ that the factors are balanced with.
    """
    u = torch.cat([block.double() @ v for block in torch.split(d, block_rows(d.shape[1]))])
    safe = torch.where(values > 0, values, torch.ones_like(values)).to(u)
    return (u / safe).float(), v.float()


def _block_krylov(d: Tensor, width: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a tall (m, n) matrix from the Krylov space of DᵀD.

    The basis lives on the smaller side n. Returns u (m, w), values (w,) float64, v (n, w).
    """
    block = gaussian(d.shape[1], width, key).to(d.device)
    block = torch.linalg.qr(block).Q
    basis = []
    for _ in range(KRYLOV_STEPS + 1):
        block = torch.linalg.qr(d.T @ (d @ block)).Q
        basis.append(block)
    q = torch.linalg.qr(torch.cat(basis, dim=1).double()).Q.float()
    image = d @ q
    wide = image.double()
    eigenvalues, small = torch.linalg.eigh(wide.T @ wide)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()[:width]
    small = small.flip(1)[:, :width]
    safe = torch.where(values > 0, values, torch.ones_like(values))
    return (wide @ small / safe).float(), values.cpu(), (q.double() @ small).float()


def gaussian(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32 standard normal numbers, a function of ``key`` alone (Philox)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(generator.standard_normal((rows, columns), dtype=np.float32))


def _with_fixed_signs(u: Tensor, v: Tensor, spectrum: Spectrum, method: str) -> Factors:
    if u.shape[1]:
        top = u.abs().argmax(dim=0, keepdim=True)
        signs = torch.where(u.gather(0, top) < 0, -1.0, 1.0)
        u, v = u * signs, v * signs
    return Factors(u, v, spectrum, method)
