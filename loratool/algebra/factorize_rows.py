"""The best low-rank approximation of a matrix that is never held whole.

The same block Krylov method as for matrices in memory, with every product made one block of rows
at a time; a smaller side that is short takes the exact way through its Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.factorize import EXACT_SIDE, left_signs
from loratool.algebra.krylov import OVERSAMPLING, block_krylov, sketch_pays
from loratool.algebra.lowrank import LowRank
from loratool.algebra.random import gaussian
from loratool.algebra.ranks import RankRule
from loratool.algebra.row_blocks import RowBlocks
from loratool.algebra.spectrum import Spectrum


@dataclass(frozen=True)
class RowFactors:
    """value: the balanced update, scale 1, float64. spectrum: every value resolved."""

    value: LowRank
    spectrum: Spectrum
    method: str


def factorize_rows(matrix: RowBlocks, rule: RankRule, *, key: str) -> RowFactors:
    """The components of a matrix that ``rule`` keeps; ``key`` determines the random start.

    Memory: a block of rows, and a few matrices of the rank's width; rules that look at all
    singular values also need the smaller side squared, in float64.
    """
    energy = sum_of_squares(matrix)
    side = min(matrix.shape)
    if energy == 0:
        return RowFactors(
            _nothing(matrix),
            Spectrum(torch.zeros(0, dtype=torch.float64), 0.0, matrix.shape),
            "zero",
        )
    guess = rule.first_guess(matrix.shape)
    while side > EXACT_SIDE and sketch_pays(guess, side):
        start = gaussian(side, guess + OVERSAMPLING, key).to(matrix.device)
        wide = matrix.shape[0] < matrix.shape[1]
        passes = _WidePasses(matrix) if wide else _TallPasses(matrix)
        _, back = passes(torch.linalg.qr(start).Q)
        ritz = block_krylov(passes, back, blocks=3)
        spectrum = Spectrum(ritz.values[:guess].cpu(), energy, matrix.shape)
        rank = rule(spectrum)
        if rank is not None:
            left, right = ritz.left(rank), ritz.right(rank)
            u, v = (right, left) if wide else (left, right)
            return RowFactors(_balanced(u, ritz.values[:rank], v), spectrum, "block Krylov")
        guess *= 2
    return _exact(matrix, rule, energy)


def sum_of_squares(matrix: RowBlocks) -> float:
    """‖D‖²_F with squares and sum in float64."""
    return sum(float(block.double().square().sum()) for _, block in matrix)


def residual_energy(matrix: RowBlocks, update: LowRank) -> float:
    """‖D − s·B·A‖²_F with the factors as stored: products and sums in float64."""
    b, a = update.b.double() * update.scale, update.a.double()
    return sum(float((block.double() - b[rows] @ a).square().sum()) for rows, block in matrix)


class _TallPasses:
    """X → D·X and Dᵀ·D·X, in one pass."""

    def __init__(self, matrix: RowBlocks):
        self._matrix = matrix

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = torch.empty(self._matrix.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        back = torch.zeros(self._matrix.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        for rows, block in self._matrix:
            image[rows] = block @ x
            back.addmm_(block.T, image[rows])
        return image, back


class _WidePasses:
    """X → Dᵀ·X and D·Dᵀ·X, in two passes: the second needs all of the first."""

    def __init__(self, matrix: RowBlocks):
        self._matrix = matrix

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        image = torch.zeros(self._matrix.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        for rows, block in self._matrix:
            image.addmm_(block.T, x[rows])
        back = torch.empty(self._matrix.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        for rows, block in self._matrix:
            back[rows] = block @ image
        return image, back


def _exact(matrix: RowBlocks, rule: RankRule, energy: float) -> RowFactors:
    """Eigenvectors of the smaller side's Gram matrix in float64, the other side by a product."""
    rows, columns = matrix.shape
    wide = rows < columns
    side = min(rows, columns)
    gram = torch.zeros(side, side, dtype=torch.float64, device=matrix.device)
    for where, block in matrix:
        if not wide:
            gram.addmm_(block.double().T, block.double())
            continue
        for other, second in matrix:  # eigh reads the lower triangle only
            if other.start <= where.start:
                gram[where, other] = block.double() @ second.double().T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp(min=0).sqrt()
    spectrum = Spectrum(values.cpu(), energy, matrix.shape)
    rank = rule(spectrum)
    assert rank is not None, "a complete spectrum decides every rule"
    near = vectors.flip(1)[:, :rank]
    far = torch.zeros(max(rows, columns), rank, dtype=torch.float64, device=matrix.device)
    for where, block in matrix:
        if wide:
            far.addmm_(block.double().T, near[where])
        else:
            far[where] = block.double() @ near
    kept = values[:rank]
    far = far / torch.where(kept > 0, kept, 1.0)
    u, v = (near, far) if wide else (far, near)
    return RowFactors(_balanced(u, kept, v), spectrum, "exact (Gram)")


def _balanced(u: Tensor, values: Tensor, v: Tensor) -> LowRank:
    root = values.sqrt().double() * left_signs(u).double()
    return LowRank(u.double() * root, (v.double() * root).T)


def _nothing(matrix: RowBlocks) -> LowRank:
    rows, columns = matrix.shape
    empty = torch.zeros(rows, 0, dtype=torch.float64, device=matrix.device)
    return LowRank(empty, empty.new_zeros(0, columns))
