"""Updates as vectors: their lengths and angles, through inner products of the factors.

A method whose result is a linear combination of the updates, with coefficients that depend on
lengths and angles only, needs no element of any update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank

COLLINEAR = 1e-8


def gram(updates: Sequence[LowRank]) -> Tensor:
    """(N, N) float64 on the CPU: ⟨ΔWᵢ, ΔWⱼ⟩."""
    b = torch.cat([update.b.double() * update.scale for update in updates], dim=1)
    a = torch.cat([update.a.double() for update in updates])
    products = (b.T @ b) * (a @ a.T)
    ends = list(accumulate((update.rank for update in updates), initial=0))
    spans = [slice(start, stop) for start, stop in pairwise(ends)]
    blocks = [torch.stack([products[rows, columns].sum() for columns in spans]) for rows in spans]
    return torch.stack(blocks).cpu()


def norms(products: Tensor) -> Tensor:
    """‖ΔWᵢ‖ from the matrix of inner products."""
    return products.diagonal().clamp(min=0).sqrt()


def cosines(products: Tensor) -> Tensor:
    """cos of the angle of each pair; 0 with an update of zero."""
    lengths = norms(products)
    scale = lengths[:, None] * lengths
    return torch.where(scale > 0, products / torch.where(scale > 0, scale, 1.0), 0.0).clamp(-1, 1)


def spherical(cosine: float, t: float) -> tuple[float, float]:
    """What slerp multiplies its two vectors with (Shoemake 1985, eq. 3)."""
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
