"""The best low-rank approximation of a dense difference, exactly or by a randomised method.

Small matrices: eigenvectors of the float64 Gram matrix of the smaller side. Large ones: block
Krylov iteration (Musco and Musco, 2015, Algorithm 2) on a Gaussian start block (Halko, Martinsson
and Tropp, 2011), whose sketch grows until the rank rule is satisfied. Products run in float32,
norms and small eigenproblems in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loratool.algebra.certificate import EXACT, ExcessBound, excess_bound
from loratool.algebra.lowrank import LowRank
from loratool.algebra.passes import image_and_back
from loratool.algebra.random import gaussian
from loratool.algebra.ranks import RankRule
from loratool.algebra.spectrum import Spectrum

EXACT_SIDE = 512
"""Up to this smaller side the Gram matrix is cheaper than a sketch."""

_SLACK = 1e-3
"""Loss of orthogonality in the float32 basis that whitening may still mend."""

OVERSAMPLING = 8
KRYLOV_STEPS = 2
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Factors:
    """The leading part of D's singular value decomposition.

    u: (m, k) and v: (n, k) with orthonormal columns, float32. spectrum: every value that was
    resolved (more than k, where there are more), with D's total energy. bound: how much more than
    the best rank-k matrix this one can miss.
    """

    u: Tensor
    v: Tensor
    spectrum: Spectrum
    method: str
    bound: ExcessBound

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    def low_rank(self) -> LowRank:
        """The balanced update (U·√Σ)(√Σ·Vᵀ), scale 1, float32."""
        root = self.spectrum.values[: self.rank].sqrt().to(self.u)
        return LowRank(self.u * root, (self.v * root).T)


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets of a tall matrix, more of them than anybody asked for.

    back: DᵀD·v, float64.
    """

    u: Tensor
    values: Tensor
    v: Tensor
    back: Tensor


@dataclass(frozen=True)
class _Right:
    """All right singular vectors (n, n) and values of a tall matrix, descending."""

    v: Tensor
    values: Tensor


def factorize(
    d: Tensor, rule: RankRule, *, key: str, exact: bool = False, noise_floor: float = 0.0
) -> Factors:
    """The components of ``d`` that ``rule`` keeps.

    d: (m, n) float32, on any device, finite. ``key`` (a seed and the tensor's name) determines
    the random start block, so that results do not depend on the order of the work. ``exact``
    forbids the randomised method. ``noise_floor`` is handed to the rule. The sign of each pair is
    fixed: the entry of the left vector with the largest magnitude is positive.
    """
    if d.shape[0] < d.shape[1]:
        factors = factorize(d.T, rule, key=key, exact=exact, noise_floor=noise_floor)
        shape = (d.shape[0], d.shape[1])
        return _with_fixed_signs(
            replace(
                factors, u=factors.v, v=factors.u, spectrum=replace(factors.spectrum, shape=shape)
            )
        )
    spectrum, rank, parts = _resolve(d, rule, key, exact, noise_floor)
    if isinstance(parts, Ritz):
        energy = spectrum.total_energy
        one_more = parts.values[: len(spectrum.values) + 1].cpu()
        spectrum = replace(spectrum, values=one_more)
        bound = excess_bound(d, parts.values, parts.v, parts.back, rank, energy, key)
        factors = Factors(parts.u[:, :rank], parts.v[:, :rank], spectrum, "block Krylov", bound)
    else:
        u, v = _left_from_right(d, parts.v[:, :rank], parts.values[:rank])
        factors = Factors(u, v, spectrum, "exact (Gram)", EXACT)
    return _with_fixed_signs(factors)


class _Resolved(NamedTuple):
    """A spectrum that decides the rule, the rank it gives, and what factors are made from."""

    spectrum: Spectrum
    rank: int
    parts: Ritz | _Right


def _resolve(d: Tensor, rule: RankRule, key: str, exact: bool, noise_floor: float) -> _Resolved:
    """Resolve values of a tall matrix until the rule is decided."""
    shape = (d.shape[0], d.shape[1])
    energy = sum_of_squares(d)
    if not exact:
        guess = rule.first_guess(shape)
        while shape[1] > EXACT_SIDE and sketch_pays(guess, shape[1]):
            start = gaussian(shape[1], guess + OVERSAMPLING, key).to(d.device)
            ritz = block_krylov(partial(image_and_back, d), start)
            spectrum = Spectrum(ritz.values[:guess].cpu(), energy, shape, noise_floor)
            rank = rule(spectrum)
            if rank is not None:
                return _Resolved(spectrum, rank, ritz)
            guess *= 2
    right = _gram_eigenvectors(d)
    spectrum = Spectrum(right.values.cpu(), energy, shape, noise_floor)
    rank = rule(spectrum)
    assert rank is not None, "a complete spectrum decides every rule"
    return _Resolved(spectrum, rank, right)


def resolve_spectrum(
    d: Tensor, rule: RankRule, *, key: str, exact: bool = False, noise_floor: float = 0.0
) -> Spectrum:
    """The singular values that ``rule`` looks at, as ``factorize`` resolves them.

    Without factors, and so without the certificate that costs a good part of theirs.
    """
    shape = (d.shape[0], d.shape[1])
    tall = d if shape[0] >= shape[1] else d.T
    return replace(_resolve(tall, rule, key, exact, noise_floor).spectrum, shape=shape)


def sketch_pays(guess: int, side: int) -> bool:
    return (guess + OVERSAMPLING) * (KRYLOV_STEPS + 1) <= side // 2


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
    total = 0.0
    for block in torch.split(d, block_rows(d.shape[1])):
        flat = block.double().reshape(-1)
        total += float(torch.dot(flat, flat))
    return total


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


def _gram_eigenvectors(d: Tensor) -> _Right:
    gram = torch.zeros(d.shape[1], d.shape[1], dtype=torch.float64, device=d.device)
    for block in torch.split(d, block_rows(d.shape[1])):
        wide = block.double()
        gram.addmm_(wide.T, wide)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return _Right(vectors.flip(1), eigenvalues.flip(0).clamp(min=0).sqrt())


def _left_from_right(d: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """u = D·v/σ in float64.

    A Gram matrix resolves σ down to about 1e-8·σ₁; below, u is not of length one. Its product
    with σ, which is all that an update needs, is D·v whatever σ is.
    """
    u = torch.cat([block.double() @ v for block in torch.split(d, block_rows(d.shape[1]))])
    safe = torch.where(values > 0, values, torch.ones_like(values))
    return (u / safe).float(), v.float()


def block_krylov(apply: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Ritz:
    """All Ritz triplets of an (m, n) matrix D on the Krylov space of DᵀD from ``start`` (n, c).

    apply: from X (n, c) to D·X and DᵀD·X, float32. n should be D's smaller side, for the basis B
    lives there; each pass over D gives a block's image D·B and
    Dᵀ·D·B together, the second being the next block before orthogonalisation. B is orthonormal
    to float64 where it counts: the float32 basis is whitened by its own Gram matrix.
    """
    block = torch.linalg.qr(start).Q
    block = torch.linalg.qr(apply(block)[1]).Q
    blocks, images, backs = [], [], []
    for step in range(KRYLOV_STEPS + 1):
        image, back = apply(block)
        blocks.append(block)
        images.append(image)
        backs.append(back)
        if step < KRYLOV_STEPS:
            block = _orthogonal_to(torch.cat(blocks, dim=1), back)
    basis = torch.cat(blocks, dim=1).double()
    gram = basis.T @ basis
    if float((gram - torch.eye(len(gram)).to(gram)).abs().max()) > _SLACK:
        # D has a lower rank than the space has dimensions, and the last blocks are noise
        mended = torch.linalg.qr(basis).Q.float()
        image, back = apply(mended)
        images, backs, basis = [image], [back], mended.double()
        gram = basis.T @ basis
    whiten = torch.linalg.inv(torch.linalg.cholesky(gram)).T
    image = torch.cat(images, dim=1).double() @ whiten
    eigenvalues, small = torch.linalg.eigh(image.T @ image)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    small = small.flip(1)
    safe = torch.where(values > 0, values, torch.ones_like(values))
    rotate = whiten @ small
    return Ritz(
        (image @ small / safe).float(),
        values,
        (basis @ rotate).float(),
        torch.cat(backs, dim=1).double() @ rotate,
    )


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what ``block`` adds to ``basis``."""
    for _ in range(2):
        block = torch.linalg.qr(block).Q
        block = block - basis @ (basis.T @ block)
    orthonormal: Tensor = torch.linalg.qr(block).Q
    return orthonormal


def left_signs(u: Tensor) -> Tensor:
    """(k,): ±1, such that the largest entry of each column of u (m, k) becomes positive."""
    if not u.numel():
        return u.new_ones(u.shape[1])
    top = u.abs().argmax(dim=0, keepdim=True)
    return torch.where(u.gather(0, top)[0] < 0, -1.0, 1.0).to(u)


def _with_fixed_signs(factors: Factors) -> Factors:
    if not factors.rank:
        return factors
    signs = left_signs(factors.u)
    return replace(factors, u=factors.u * signs, v=factors.v * signs)
