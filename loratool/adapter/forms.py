"""LoHa and LoKr as plain low-rank updates, exact to the rounding of float64.

(B₁A₁) ∘ (B₂A₂) is the product of the row-wise Khatri–Rao product of B₁ and B₂ with the column-wise
one of A₁ and A₂ (Liu and Trenkler, 2008), of rank r₁·r₂. C ⊗ (B·A), with C = C·I or I·C written as
a product itself, is (C ⊗ B)·(I ⊗ A) (Van Loan, 2000). Nothing is decomposed. Products of two stored
values of at most 24 bits are exact in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter.updates import (
    HadamardUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    TensorProduct,
)
from loratool.storage.dtypes import F64, DType

Structured = HadamardUpdate | KroneckerUpdate


def form_rank(update: Structured) -> int:
    """The rank of the low-rank form: the product of the factors' ranks."""
    return _rank(update.first) * _rank(update.second)


def low_rank_form(update: Structured) -> LowRankUpdate | None:
    """The same update as a low-rank one; None where its factors would be larger than the matrix.

    A convolution's kernel is known from Tucker cores and from matrices stored whole; without
    either the form is that of a matrix.
    """
    rows, columns = update.shape
    rank = form_rank(update)
    if rank * (rows + columns) > rows * columns:
        return None
    kernel = _kernel(update)
    b_shape = (rows, rank, *(1 for _ in kernel))
    a_shape = (rank, columns // math.prod(kernel), *kernel)
    return LowRankUpdate(
        FormFactor(update, 0, b_shape), FormFactor(update, 1, a_shape), update.scale, rank * 1.0
    )


@dataclass(frozen=True)
class FormFactor:
    """B (side 0) or A (side 1) of a structured update's low-rank form, computed when read."""

    update: Structured
    side: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return F64

    def read(self) -> Tensor:
        one, two = (_sides(p)[self.side] for p in (self.update.first, self.update.second))
        if isinstance(self.update, KroneckerUpdate):
            factor = torch.kron(one, two)
            if self.update.interleaved:
                rows, columns = self.update.places
                factor = factor[rows] if self.side == 0 else factor[:, columns]
            return factor.reshape(self.shape)
        if self.side == 0:
            return (one[:, :, None] * two[:, None, :]).reshape(self.shape)
        return (one[:, None, :] * two[None, :, :]).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]


def _rank(product: TensorProduct) -> int:
    return product.rank if product.rank is not None else min(product.shape)


def _sides(product: TensorProduct) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, columns), float64, whose product is the matrix."""
    values = [factor.read().double() for factor in product.factors]
    if len(values) == 3:
        t, b, a = values
        return b.T.contiguous(), torch.einsum("ij...,jq->iq...", t, a).contiguous().flatten(1)
    if len(values) == 2:
        return values[0].flatten(1), values[1].flatten(1)
    whole = values[0].flatten(1)
    eye = torch.eye(min(whole.shape), dtype=torch.float64)
    return (whole, eye) if whole.shape[1] <= whole.shape[0] else (eye, whole)


def _kernel(update: Structured) -> tuple[int, ...]:
    """The kernel's sides, () where the factors do not tell."""
    for product in (update.second, update.first):
        if len(product.factors) != 2 and len(product.factors[0].shape) > 2:
            return product.factors[0].shape[2:]
    return ()
