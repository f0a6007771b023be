"""Leading singular triplets of a large matrix by a randomised block method.

A random sketch of the rows (Halko, Martinsson and Tropp, 2011; of uniform numbers here) is steered
towards the leading directions by power steps in a fast dtype, whose rounding only turns the start a
little. From there on, block Krylov iteration (Musco and Musco, 2015, Algorithm 2) with products in
float32 and the Rayleigh–Ritz step in float64.

With an orthonormal basis V of the Krylov space, D·V = Q·Θ·(rotation). The last product, DᵀD·V,
gives QᵀD besides: D is approximated by Q·(QᵀD), which is half a power step better than
(D·V)·Vᵀ and costs no further pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loratool.algebra.passes import RoughMatrix, image_and_back, image_of
from loratool.algebra.random import uniform
from loratool.stopwatch import Stopwatch

OVERSAMPLING = 8
SETTLING = 24
"""Oversampling for values that have to be settled: cheaper than a second block."""

STEERING_STEPS, SETTLING_STEPS = 2, 3
BLOCKS = 2

GRAM_RESOLVES = 1e-8
"""Of the largest singular value: smaller ones drown in the rounding of a float64 Gram matrix."""

_LARGE = 1e-3
"""Of the largest singular value: for those above, float32 products with D say more of DᵀQ than the
Krylov space does; below, they say less, since their error is one of the largest value."""

SETTLED = 0.01
"""Of a squared singular value: the error that counts as settled, where values fall."""
_ALIKE = 1e-3
"""Of a squared singular value: the residual that counts as settled, where values do not fall. Each
random column has a share of a direction that is missed, and that share of how much larger its value
is shows in the residual: a value 3 % above 1500 equal ones left 1.4 %."""
_RESTARTS, _MORE_BLOCKS = 8, 4
_FLOAT32 = 1e-6
"""What float32 products leave of a residual, of the value times the largest one."""
_NOTHING = 1e-6
"""Of the largest value: a space whose last values are below has missed none that is much larger.
Its last columns are random with respect to what it misses, and so each has a share of it, of about
one part in √n."""

_EXHAUSTED = 1e-4
"""Of ‖D‖²: what is left beside the values where a sketch in bf16, of which they miss up to 2·10⁻⁶,
does not say enough of it to tell a LoRA."""

_DROWNED = 5e-3
"""Of the largest value: what a 16-bit float rounds away from a block covers directions of values
below this."""
_FLAT = 0.9
"""Of a value, the one ``OVERSAMPLING`` places on: where values fall no faster, directions are hard
to tell apart."""

_SLACK = 1e-3
"""Loss of orthogonality in the float32 basis that whitening may still mend."""


@dataclass(frozen=True)
class Ritz:
    """Approximate singular triplets of a tall (m, n) matrix D, more of them than anybody asked for.

    values: (l,) float64, descending, the singular values of QᵀD, none above D's own. theta: (l,)
    float64, descending, those of D·v. v: (n, l) float32, orthonormal. back: DᵀD·v, float64.
    image: D·basis (m, l) float32, which ``project`` (l, l) makes Q. row: DᵀQ (n, l) float64. mix:
    (l, l), the singular vectors of QᵀD in Q.
    """

    values: Tensor
    theta: Tensor
    v: Tensor
    back: Tensor
    image: Tensor
    project: Tensor
    row: Tensor
    mix: Tensor

    def left(self, rank: int) -> Tensor:
        """The first ``rank`` left vectors, (m, rank) float32."""
        return (self.image.double() @ (self.project @ self.mix[:, :rank])).float()

    def q(self, count: int) -> Tensor:
        """The first ``count`` columns of Q, D·v/theta: the left vectors that belong to v."""
        return (self.image.double() @ self.project[:, :count]).float()

    def right(self, rank: int) -> Tensor:
        """The first ``rank`` right vectors, (n, rank) float32."""
        return (self.row @ (self.mix[:, :rank] * _inverse(self.values[:rank]))).float()


def sketch_pays(guess: int, side: int) -> bool:
    """Whether ``guess`` triplets cost less by this method than all of them."""
    return (guess + OVERSAMPLING) * BLOCKS <= side // 3


def steered_start(
    rough: RoughMatrix, width: int, key: str, *, steps: int = STEERING_STEPS
) -> Tensor:
    """A block (n, width) that leans towards the leading right singular vectors of a matrix (m, n).

    ``key`` determines the random numbers.
    """
    block = rough.back(uniform(rough.rows, width, key))
    for _ in range(steps):
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
    if float((gram - torch.eye(len(gram), dtype=gram.dtype).to(gram)).abs().max()) > _SLACK:
        # D has a lower rank than the space has dimensions, and the last blocks are noise
        with stopwatch.stage("orthogonalise"):
            basis = torch.linalg.qr(basis.double()).Q.float()
            gram = _gram(basis)
        with stopwatch.stage("sketch"):
            image, back = apply(basis)
        images, backs = [image], [back]
    with stopwatch.stage("orthogonalise"):
        return _rayleigh_ritz(basis.double(), gram, torch.cat(images, 1), torch.cat(backs, 1))


def was_drowned(theta: Tensor, count: int) -> bool:
    """Whether power steps in a 16-bit dtype cannot have led to the directions of the ``count``
    first values: flat noise, far below the largest, is what they round away."""
    beyond = theta[min(count + OVERSAMPLING, len(theta)) - 1]
    last = theta[min(count, len(theta)) - 1]
    is_small = (last < _DROWNED * theta[0]) & (last > _NOTHING * theta[0])
    return bool(is_small & (beyond > _FLAT * last))


def settled(
    d: Tensor,
    count: int,
    *,
    key: str,
    energy: float,
    dtype: torch.dtype,
    copy: Tensor | None = None,
) -> Tensor | None:
    """The first singular values of d (m, n), ``count`` of them settled: float64, descending. None
    where this method does not settle them.

    Where values fall, one wide block is enough, and only its image is taken in float32: products
    back in ``dtype`` tell well enough whether it is. Of noise, whose values lie close together, it
    takes further spaces, each from the leading directions of the one before; so it does where
    values are much smaller than the first, and where hardly anything is left beside these values,
    since what ``dtype`` makes them miss would be seen in it. energy: ‖d‖²_F. copy: see RoughMatrix.
    """
    width, rough = count + SETTLING, RoughMatrix(d, dtype, copy)
    start = steered_start(rough, width, key, steps=SETTLING_STEPS)
    basis = _orthogonal_to(start[:, :0], start)
    image = image_of(d, basis)
    theta, rotate = _descending(image.double().T @ image.double())
    # turned first, so that the fast dtype rounds each column by its own size
    back, v = rough.back(image @ rotate.float()), basis @ rotate.float()
    left = energy - float(theta[:count].square().sum())
    says_what_is_left = dtype == torch.float32 or left >= _EXHAUSTED * energy
    if says_what_is_left and _are_settled(theta, v, back, count):
        return theta
    del rough
    apply, blocks = partial(image_and_back, d), BLOCKS
    for _ in range(_RESTARTS):
        ritz = block_krylov(apply, start, blocks=blocks)
        if _are_settled(ritz.theta, ritz.v, ritz.back, count):
            return ritz.values
        start, blocks = ritz.v[:, :width], _MORE_BLOCKS
    return None


def _are_settled(theta: Tensor, v: Tensor, back: Tensor, count: int) -> bool:
    """Whether the first ``count`` values θ of pairs v are, with back = DᵀD·v: each to 1 %, or to
    10⁻⁵ of the largest.

    The residual r = ‖DᵀD·v − θ²·v‖ says how near to θ² a true squared value is: no farther than r,
    and by about r²/gap where what lies outside of the space is smaller by a gap (Kato and Temple).
    The value half-way to the last is taken for what lies outside.
    """
    squares = theta.square()
    outside = squares[min((count + len(squares)) // 2, len(squares) - 1)]
    theta, squares = theta[:count], squares[:count]
    rest = residual(back[:, :count], v[:, :count], squares)
    residuals = torch.linalg.vector_norm(rest, dim=0)
    alike = residuals <= _ALIKE * squares + _FLOAT32 * theta * theta[0]
    apart = residuals.square() <= SETTLED * squares * (squares - outside)
    return bool((alike | apart | (theta <= _NOTHING * theta[0])).all())


def residual(back: Tensor, v: Tensor, squares: Tensor) -> Tensor:
    """DᵀD·v − θ²·v of pairs v (n, l), of which ``back`` is DᵀD·v: (n, l) float64. squares: θ²."""
    return back.double() - v.double() * squares


def _gram(basis: Tensor) -> Tensor:
    wide = basis.double()
    return wide.T @ wide


def _rayleigh_ritz(basis: Tensor, gram: Tensor, image: Tensor, back: Tensor) -> Ritz:
    whiten = torch.linalg.inv(torch.linalg.cholesky(gram)).T
    wide = image.double()
    theta, small = _descending(whiten.T @ (wide.T @ wide) @ whiten)
    rotate = whiten @ small
    back = back.double() @ rotate
    v = basis @ rotate
    # DᵀQ, where Q = image·rotate/theta; of small theta V·theta, which has less rounding in it
    large = int((theta > _LARGE * theta[0]).sum())
    row = torch.cat([back[:, :large] * _inverse(theta)[:large], (v * theta)[:, large:]], 1)
    values, mix = _descending(row.T @ row)
    return Ritz(
        values,
        theta,
        v.float(),
        back,
        image,
        rotate * _inverse(theta),
        row,
        mix,
    )


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of a matrix with this Gram matrix, and its right singular vectors."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _inverse(values: Tensor) -> Tensor:
    """1/values; zero for those that a Gram matrix does not resolve."""
    resolved = values > GRAM_RESOLVES * values[:1]
    return torch.where(resolved, 1 / values, torch.zeros_like(values))


def _orthogonal_to(basis: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of what ``block`` adds to ``basis``."""
    orthonormal: Tensor = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    if basis.shape[1]:  # once more removes what rounding left
        orthonormal = torch.linalg.qr(orthonormal - basis @ (basis.T @ orthonormal)).Q
    return orthonormal
