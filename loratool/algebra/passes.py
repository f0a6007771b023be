"""Thin products with a large matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.blocks import large_matrix

_ROWS = 256
"""Rows at a time: a block is used twice while it is in cache."""


def image_and_back(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """D·x (m, c) and Dᵀ·D·x (n, c) for a tall d (m, n) and x (n, c), float32.

    A block of rows is multiplied twice while it is in cache, where rows lie side by side in
    memory; else each product goes through the whole of d at once.
    """
    if d.is_cuda or not d.is_contiguous():
        image = image_of(d, x)
        return image, back_of(d, image)
    xt = x.T.contiguous()
    image_t = torch.empty(x.shape[1], d.shape[0], dtype=d.dtype)
    back_t = torch.zeros(x.shape[1], d.shape[1], dtype=d.dtype)
    for start in range(0, d.shape[0], _ROWS):
        block = d[start : start + _ROWS]
        part = xt @ block.T
        image_t[:, start : start + _ROWS] = part
        back_t.addmm_(part, block)
    return image_t.T, back_t.T


def image_of(d: Tensor, x: Tensor) -> Tensor:
    """D·x (m, c).

    Here and in ``back_of``, the few columns come first, as (c, m): with the long side last, BLAS
    libraries are several times faster on thin matrices. (GPUs do not care.)
    """
    return (x.T @ d.T).T


def back_of(d: Tensor, y: Tensor) -> Tensor:
    """Dᵀ·y (n, c)."""
    return (y.T @ d).T


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype for products that only have to point somewhere: bf16 where it is native.

    Elsewhere its products are emulated, and float32 is faster.
    """
    if device.type == "cuda":
        return torch.bfloat16
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    native = known.get("avx512_bf16") or known.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


class RoughMatrix:
    """A copy of a matrix in a fast dtype, for directions that need no precision."""

    def __init__(self, d: Tensor, dtype: torch.dtype):
        self._dtype = dtype
        self._d = d if d.dtype == dtype else _copied(d, dtype)

    def back(self, x: Tensor) -> Tensor:
        """Dᵀ·x (n, c) in float32, for x (m, c)."""
        return (x.T.to(self._dtype) @ self._d).T.float()

    def there_and_back(self, x: Tensor) -> Tensor:
        """Dᵀ·D·x (n, c) in float32, for x (n, c)."""
        return ((x.T.to(self._dtype) @ self._d.T) @ self._d).T.float()


def _copied(d: Tensor, dtype: torch.dtype) -> Tensor:
    """With d's own layout, so that copying does not transpose."""
    if not d.is_contiguous() and d.T.is_contiguous():
        return _copied(d.T, dtype).T
    return large_matrix(d.shape[0], d.shape[1], dtype, d.device).copy_(d)
