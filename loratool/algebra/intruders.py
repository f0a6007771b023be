"""Intruder dimensions: strong singular vectors of a tuned weight that its base does not have.

Shuttleworth, Andreas, Torralba and Sharma (2024), "LoRA vs full fine-tuning: an illusion of
equivalence", Algorithm 1: the j-th left singular vector u of W is an intruder if |cos(u, xᵢ)| < ε
for every left singular vector xᵢ of W0. All xᵢ would take a full decomposition of W0. Here the
leading ones are resolved, and of the rest a bound is enough: the squared cosines of u are the
masses of its spectral measure under W0·W0ᵀ, and Lanczos steps from u give the polynomials
p₀ … p_{k−1} that are orthonormal for that measure. No mass at a place t exceeds the Christoffel
function 1 / Σⱼ pⱼ(t)² (Akhiezer, The classical moment problem, 1965, theorem 2.5.2), which falls as
1/k for a vector that is spread over many xᵢ. Its maximum over the whole interval bounds every
cosine. Where neither side is certain, both matrices are decomposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loratool.algebra.blocks import float64_blocks
from loratool.algebra.factorize import EXACT_SIDE
from loratool.algebra.krylov import (
    OVERSAMPLING,
    Ritz,
    block_krylov,
    residual,
    sketch_pays,
    steered_start,
)
from loratool.algebra.lowrank import LowRank
from loratool.algebra.passes import RoughMatrix, fastest_dtype, image_and_back

CONVERGED = 1e-3
"""Sine of the angle to the true singular vector that counts as resolved."""

STEPS = (12, 24, 40, 64)
"""Lanczos steps after which the bound is taken; the later ones only while it does not decide."""

_RESTARTS = 5
_TURNS = 48
"""Places between two eigenvalues at which the Christoffel function is looked at."""
_ROUNDING = 1e-2
"""What float32 products may put into a cosine, of the start's length: 0.003 was the most in
hundreds of small cases, of the directions with the smallest singular values."""
_TINY = torch.finfo(torch.float64).tiny
_EXHAUSTED = 1e-5
"""Of W0·W0ᵀ·x: what float32 products leave where the Krylov space has no further dimension."""
_NULL = 1e-7
"""Of the largest singular value: below, a Gram matrix does not tell directions from rounding."""


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a matrix: u (m, k), values (k,) float64, v (n, k), float32.

    sines: (k,) float64, bounds on the sines of the angles between these vectors and the true ones.
    """

    u: Tensor
    values: Tensor
    v: Tensor
    sines: Tensor


@dataclass(frozen=True)
class Examined:
    """The leading singular triplets of W, each with how W0 has it.

    cosines: (k,), the largest |cos| to a left singular vector of W0 that was found; at_most: (k,),
    a bound on any. intruders: which of the k are. base_value: ‖W0‖₂. exact: whether both matrices
    were decomposed whole.
    """

    triplets: Triplets
    cosines: Tensor
    at_most: Tensor
    intruders: Tensor
    base_value: float
    exact: bool

    def part(self) -> LowRank | None:
        """Σ σ·u·vᵀ over the intruders, as a balanced update of scale 1; None without any."""
        if not bool(self.intruders.any()):
            return None
        found = self.triplets
        root = found.values[self.intruders].sqrt()
        b = found.u[:, self.intruders].double() * root
        return LowRank(b.float(), (found.v[:, self.intruders].double() * root).T.float())


def examine(
    base: Tensor, tuned: Tensor, *, top: int, epsilon: float, key: str, exact: bool = False
) -> Examined:
    """Which of the ``top`` leading left singular vectors of ``tuned`` are not those of ``base``.

    base, tuned: (out, in), float32, finite, on one device; of equal shapes. epsilon: the largest
    |cos| that an intruder may not reach. key: of the random start. exact: decompose both whole.
    """
    top = min(top, *base.shape)
    sketched = (
        not exact
        and min(base.shape) > EXACT_SIDE
        and sketch_pays(2 * (top + OVERSAMPLING), min(base.shape))
    )
    if sketched:
        found = leading(tuned, top, f"{key}:tuned")
        decided = _certified(base, found, epsilon, f"{key}:base")
        if decided is not None:
            return decided
    return _exact(base, tuned, top, epsilon)


def leading(d: Tensor, count: int, key: str) -> Triplets:
    """The ``count`` leading triplets by block Krylov iteration, restarted until they have settled.

    The bound on a right vector's sine is its residual in DᵀD over the gap to the nearest other
    value (Davis and Kahan, 1970); a left one's is that times σ₁/σ.
    """
    tall = d if d.shape[0] >= d.shape[1] else d.T
    rough = RoughMatrix(tall, fastest_dtype(d.device))
    start = steered_start(rough, count + OVERSAMPLING, key)
    del rough
    for _ in range(_RESTARTS):
        ritz = block_krylov(partial(image_and_back, tall), start)
        sines = _sines(ritz, count)
        if float(sines.max()) <= CONVERGED:
            break
        start = ritz.v[:, : count + OVERSAMPLING]
    u, v = ritz.q(count), ritz.v[:, :count]
    u, v = (u, v) if d.shape[0] >= d.shape[1] else (v, u)
    return Triplets(u, ritz.theta[:count], v, sines)


def _sines(ritz: Ritz, count: int) -> Tensor:
    squares = ritz.theta.square()
    rest = residual(ritz.back, ritz.v, squares)
    residuals = torch.linalg.vector_norm(rest, dim=0)[:count]
    distances = (squares[:, None] - squares[None, :count]).abs()
    distances.fill_diagonal_(torch.inf)
    gaps = (distances.min(dim=0).values - residuals).clamp(min=0)
    sines = torch.where(gaps > 0, residuals / gaps, torch.inf)
    safe = ritz.theta[:count].clamp(min=_TINY)
    return (sines * (ritz.theta[0] / safe)).clamp(max=1.0)


def _certified(base: Tensor, found: Triplets, epsilon: float, key: str) -> Examined | None:
    """The answer where every vector is certainly one or the other; None else."""
    known = leading(base, len(found.values) + OVERSAMPLING, key)
    settled = known.sines <= CONVERGED
    x, error = known.u[:, settled].double(), known.sines[settled]
    u = found.u.double()
    cosines = (x.T @ u).abs()
    slack = found.sines * 2**0.5 + float(error.max() if len(error) else 0.0) * 2**0.5
    largest = cosines.max(dim=0).values if len(cosines) else u.new_zeros(u.shape[1])
    old = largest - slack >= epsilon
    at_most = torch.ones_like(largest)
    at_most[old] = (largest[old] + slack[old]).clamp(max=1.0)
    open_ = torch.nonzero(~old).flatten()
    if len(open_):
        rest = u[:, open_] - x @ (x.T @ u[:, open_])
        wanted = epsilon - slack[open_]
        bound = largest_cosine_at_most(base, rest, wanted)
        at_most[open_] = torch.maximum(bound, largest[open_]) + slack[open_]
        if bool((at_most[open_] >= epsilon).any()):
            return None
    return Examined(found, largest, at_most, ~old, float(known.values[0]), exact=False)


def largest_cosine_at_most(base: Tensor, starts: Tensor, wanted: Tensor) -> Tensor:
    """(c,): for each column of ``starts`` (m, c), a bound on max_i |xᵢᵀ·column| over all left
    singular vectors xᵢ of ``base`` (m, n).

    wanted: (c,), bounds below which no more steps are taken. Products run in float32, so that the
    bound is for ``base`` to within such rounding; the recurrences in float64, every Lanczos vector
    orthogonalised against all before. A column whose Krylov space is exhausted is left as it is:
    its measure is then known.
    """
    norms: Tensor = torch.linalg.vector_norm(starts.double(), dim=0)
    columns, size = starts.shape[1], starts.shape[0]
    basis = norms.new_zeros(columns, max(STEPS) + 1, size)
    basis[:, 0] = (starts.double() / norms.clamp(min=_TINY)).T
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    best = norms.clone()
    going = torch.ones_like(norms, dtype=torch.bool)
    scale = torch.zeros_like(norms)
    for step in range(1, max(STEPS) + 1):
        last, before = basis[:, step - 1], basis[:, :step]
        image = _there_and_back(base, last)
        scale = torch.maximum(scale, torch.linalg.vector_norm(image, dim=1))
        diagonal.append((last * image).sum(dim=1))
        for _ in range(2):
            shares = before @ image[:, :, None]
            image = image - (before.mT @ shares)[:, :, 0]
        length = torch.linalg.vector_norm(image, dim=1)
        beside.append(length.clamp(min=_TINY))
        basis[:, step] = image / beside[-1][:, None]
        ended = going & (length <= _EXHAUSTED * scale)
        if step in STEPS or bool(ended.any()):
            asked = going if step in STEPS else ended
            masses = _largest_masses(
                torch.stack(diagonal)[:, asked].cpu(), torch.stack(beside)[:-1, asked].cpu()
            )
            bounds = norms[asked] * (masses.sqrt().to(norms) + _ROUNDING)
            best[asked] = torch.minimum(best[asked], bounds)
        going = going & ~ended
        if not bool((going & (best >= wanted)).any()):
            break
    return best


def _there_and_back(base: Tensor, x: Tensor) -> Tensor:
    """The columns of W0·W0ᵀ·xᵀ for x (c, m), as rows in float64."""
    image = x.to(base.dtype) @ base
    back: Tensor = image @ base.T
    return back.double()


def _largest_masses(diagonal: Tensor, beside: Tensor) -> Tensor:
    """(c,): the maxima, right of zero, of the Christoffel functions of measures of mass 1.

    diagonal: (k, c), beside: (k − 1, c), of the Jacobi matrices. With another last diagonal entry
    a Jacobi matrix has other eigenvalues, and the squared first entries of its eigenvectors are
    the function's values there; as that entry goes through all numbers, the eigenvalues do too
    (Golub, 1973, Some modified matrix eigenvalue problems, §7).
    """
    jacobi = torch.diag_embed(diagonal.T)
    jacobi += torch.diag_embed(beside.T, 1) + torch.diag_embed(beside.T, -1)
    size = diagonal.abs().max(dim=0).values
    angles = (torch.arange(_TURNS, dtype=torch.float64) / _TURNS - 0.5) * torch.pi
    turned = jacobi.repeat(_TURNS, 1, 1, 1)
    turned[..., -1, -1] += angles.tan().clamp(-1e6, 1e6)[:, None] * size
    places, vectors = torch.linalg.eigh(turned)
    masses = vectors[..., 0, :].square()
    masses = torch.where(places >= -1e-9 * size[:, None], masses, torch.zeros_like(masses))
    largest: Tensor = masses.amax(dim=(0, 2)).clamp(max=1.0)
    return largest


def _exact(base: Tensor, tuned: Tensor, top: int, epsilon: float) -> Examined:
    """Both decomposed through the float64 Gram matrix of the smaller side."""
    found = _all_triplets(tuned, top)
    known = _all_triplets(base, min(base.shape))
    alive = known.values > _NULL * float(known.values[0])
    cosines = (known.u[:, alive].T @ found.u).abs()
    largest = (
        cosines.max(dim=0).values.clamp(max=1.0) if len(cosines) else found.values.new_zeros(top)
    )
    triplets = Triplets(found.u.float(), found.values, found.v.float(), found.sines)
    return Examined(
        triplets, largest, largest, largest < epsilon, float(known.values[0]), exact=True
    )


def _all_triplets(d: Tensor, count: int) -> Triplets:
    tall = d if d.shape[0] >= d.shape[1] else d.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=d.device)
    for _, block in float64_blocks(tall):
        gram.addmm_(block.T, block)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0)[:count].clamp(min=0).sqrt()
    right = vectors.flip(1)[:, :count]
    safe = torch.where(values > 0, values, torch.ones_like(values))
    left = torch.cat([block @ right for _, block in float64_blocks(tall)]) / safe
    u, v = (left, right) if d.shape[0] >= d.shape[1] else (right, left)
    return Triplets(u, values, v, torch.zeros_like(values))
