"""KaSA merged: RN(T(W) + s·B·diag(d)·A), T(W) being W without its r smallest singular components.

With Q the r eigenvectors of the smaller of W·Wᵀ and Wᵀ·W that belong to its smallest eigenvalues,
T(W) = W − Q·Qᵀ·W or W − W·Q·Qᵀ. Eigenvectors come from float64 and are as good as those of a
float32 SVD, which PEFT uses, down to singular values of 10⁻⁷ of the largest; where the last one
left out and the first one kept are equal to many digits, neither is determined, and T with them
(by at most that value). T(W) is rounded to W's dtype; only from there on is the result certified.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.certified_terms import CertifiedTerms, finite_or_error
from loratool.algebra.exact_matrix import ExactMatrix
from loratool.algebra.rounding import RoundedBlock, equal_bits, round_once
from loratool.errors import DisagreementError

_CHUNK_ELEMENTS = 2**22


class KasaSum:
    """A term added to the truncated matrix; blocks of rows count from ``start``.

    whole: all of W as stored. rank: how many components T leaves out. Raises DisagreementError
    where that would be all, NonFiniteValues. Works on the CPU.
    """

    def __init__(self, whole: Tensor, rank: int, term: ExactMatrix, start: int = 0):
        if rank >= min(whole.shape):
            raise DisagreementError(
                f"KaSA of rank {rank} leaves nothing of a matrix {list(whole.shape)}"
            )
        finite_or_error(whole, 0)
        self._start = start
        self._sum = CertifiedTerms([term], start)
        self._wide = whole.shape[0] <= whole.shape[1]
        chunks = _chunks(whole if self._wide else whole.T)
        side = min(whole.shape)
        gram = torch.zeros(side, side, dtype=torch.float64)
        for first, last in chunks:
            part = self._part(whole, first, last)
            gram.addmm_(part, part.T)
        self._q = torch.linalg.eigh(gram)[1][:, :rank]
        if self._wide:
            parts = [self._q.T @ self._part(whole, first, last) for first, last in chunks]
            self._projected = torch.cat(parts, dim=1)

    def _part(self, whole: Tensor, first: int, last: int) -> Tensor:
        part = whole[:, first:last] if self._wide else whole[first:last].T
        return part.double()

    def truncated(self, rows: Tensor, first_row: int) -> Tensor:
        """T(W) of these rows of W, the first of which is row ``first_row`` of the block."""
        w = rows.cpu().double()
        if self._wide:
            first = self._start + first_row
            left_out = self._q[first : first + len(w)] @ self._projected
        else:
            left_out = (w @ self._q) @ self._q.T
        return round_once(w - left_out, rows.dtype)

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """The merged rows."""
        block = self._sum.add_to(self.truncated(w0, first_row), first_row, dtype)
        changed = int((~equal_bits(block.values, w0.cpu().to(dtype))).sum())
        return RoundedBlock(block.values, changed, 0, block.level3, block.overflowed)


def _chunks(matrix: Tensor) -> list[tuple[int, int]]:
    """Column ranges of a few million values."""
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[0]))
    return [(i, min(i + step, matrix.shape[1])) for i in range(0, matrix.shape[1], step)]
