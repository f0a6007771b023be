"""MiLoRA: the weight's minor part is trained, the principal one is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.inits.method import Init, Start


def milora(weight: Tensor, start: Start) -> LowRank:
    """B = U·√Σ and A = √Σ·Vᵀ of the last r singular triplets, such that s·B·A is their sum.

    Through the float64 Gram matrix of the smaller side: D·V is exact for any orthonormal V.
    """
    rows, columns = weight.shape
    if rows < columns:
        flipped = milora(weight.T, Start((columns, rows), start.rank, start.scale, start.key))
        return flipped.T
    wide = weight.double()
    vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, : start.rank]
    image = wide @ vectors
    root = torch.linalg.vector_norm(image, dim=0).sqrt()
    safe = torch.where(root > 0, root, torch.ones_like(root))
    share = start.scale**-0.5
    return LowRank(
        (image / safe * share).float(), ((vectors * root).T * share).float(), start.scale
    )


MILORA = Init(
    "milora", "Wang et al. 2024, MiLoRA, arXiv 2406.09044, section 3.2", from_weight=milora
)
