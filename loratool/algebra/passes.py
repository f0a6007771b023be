"""Products with a large matrix that read it once."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 256
"""Rows at a time: a block is used twice while it is in cache."""


def image_and_back(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """D·x (m, c) and Dᵀ·D·x (n, c) for a tall d (m, n) and x (n, c), float32.

    Both products of a block are written with the few columns first, (c, n) and (c, rows): with
    the long side last, BLAS libraries are several times faster on thin matrices.
    """
    if d.is_cuda:
        image = d @ x
        return image, d.T @ image
    xt = x.T.contiguous()
    image_t = torch.empty(x.shape[1], d.shape[0], dtype=d.dtype)
    back_t = torch.zeros(x.shape[1], d.shape[1], dtype=d.dtype)
    for start in range(0, d.shape[0], _ROWS):
        block = d[start : start + _ROWS]
        part = xt @ block.T
        image_t[:, start : start + _ROWS] = part
        back_t.addmm_(part, block)
    return image_t.T, back_t.T
