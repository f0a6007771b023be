"""Leading singular triplets of a large matrix by a randomised block method.

A Gaussian sketch of the rows (Halko, Martinsson and Tropp, 2011) is steered towards the leading
directions by power steps in a fast dtype, whose rounding only turns the start a little. From
there on, block Krylov iteration (Musco and Musco, 2015, Algorithm 2) with products in float32 and
the Rayleigh–Ritz step in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.passes import RoughMatrix
from loratool.algebra.random import gaussian
from loratool.stopwatch import Stopwatch

OVERSAMPLING = 8
STEERING_STEPS = 2
BLOCKS = 2

_SLACK = 1e-3
"""Loss of orthogonality in the float32 basis that whitening may still mend."""


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets of a tall (m, n) matrix D, more of them than anybody asked for.

    values: (l,) float64, descending. v: (n, l) float32, orthonormal. back: DᵀD·v, float64. image:
    D·basis (m, l) float32, which ``rotate`` (l, l) turns into D·v.
    """

    values: Tensor
    v: Tensor
    back: Tensor
    image: Tensor
    rotate: Tensor

    def left(self, rank: int) -> Tensor:
        """The first ``rank`` left vectors D·v/σ, (m, rank) float32."""
        values = self.values[:rank]
        safe = torch.where(values > 0, values, torch.ones_like(values))
        return (self.image.double() @ (self.rotate[:, :rank] / safe)).float()


def sketch_pays(guess: int, side: int) -> bool:
    """Whether ``guess`` triplets cost less by this method than all of them."""
    return (guess + OVERSAMPLING) * BLOCKS <= side // 3


def steered_start(d: Tensor, width: int, key: str, dtype: torch.dtype) -> Tensor:
    """A block (n, width) that leans towards the leading right singular vectors of d (m, n).

    ``key`` determines the random numbers; products are in ``dtype``.
    """
    rough = RoughMatrix(d, dtype)
    block = rough.back(gaussian(d.shape[0], width, key).to(d.device))
    for _ in range(STEERING_STEPS):
        block = rough.there_and_back(torch.linalg.qr(block).Q)
    return block


def block_krylov(
    apply: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    blocks: int = BLOCKS,
    stopwatch: Stopwatch | None = None,
) -> Ritz:
    """All Ritz triplets of an (m, n) matrix D on the Krylov space of DᵀD from ``start`` (n, c).

    apply: from X (n, c) to D·X and DᵀD·X, float32. n should be D's smaller side, for the basis
    lives there; each pass over D gives a block's image and the next block before
    orthogonalisation. The basis is orthonormal to float64 where it counts: the float32 one is
    whitened by its own Gram matrix.
    """
    stopwatch = stopwatch or Stopwatch()
    basis, images, backs = start.new_empty(start.shape[0], 0), [], []
    block = start
    for _ in range(blocks):
        with stopwatch.stage("orthogonalise"):
            block = _orthogonal_to(basis, block)
            basis = torch.cat([basis, block], dim=1)
        with stopwatch.stage("sketch"):
            image, back = apply(block)
        images.append(image)
        backs.append(back)
        block = back
    with stopwatch.stage("orthogonalise"):
        gram = _gram(basis)
    if float((gram - torch.eye(len(gram)).to(gram)).abs().max()) > _SLACK:
        # D has a lower rank than the space has dimensions, and the last blocks are noise
        with stopwatch.stage("orthogonalise"):
            basis = torch.linalg.qr(basis.double()).Q.float()
            gram = _gram(basis)
        with stopwatch.stage("sketch"):
            image, back = apply(basis)
        images, backs = [image], [back]
    with stopwatch.stage("orthogonalise"):
        return _rayleigh_ritz(basis.double(), gram, torch.cat(images, 1), torch.cat(backs, 1))


def _gram(basis: Tensor) -> Tensor:
    wide = basis.double()
    return wide.T @ wide


def _rayleigh_ritz(basis: Tensor, gram: Tensor, image: Tensor, back: Tensor) -> Ritz:
    whiten = torch.linalg.inv(torch.linalg.cholesky(gram)).T
    wide = image.double()
    eigenvalues, small = torch.linalg.eigh(whiten.T @ (wide.T @ wide) @ whiten)
    rotate = whiten @ small.flip(1)
    return Ritz(
        eigenvalues.flip(0).clamp(min=0).sqrt(),
        (basis @ rotate).float(),
        back.double() @ rotate,
        image,
        rotate,
    )


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what ``block`` adds to ``basis``."""
    for _ in range(2 if basis.shape[1] else 0):
        block = torch.linalg.qr(block).Q
        block = block - basis @ (basis.T @ block)
    orthonormal: Tensor = torch.linalg.qr(block).Q
    return orthonormal
