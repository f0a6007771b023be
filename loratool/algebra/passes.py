"""Thin products with a large matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from loratool.algebra.blocks import large_matrix

_ROWS = 512
"""Rows at a time: a block is used twice while it is in cache."""

_COPIED, _COPIED_AT_A_TIME = 2**25, 2**21
"""Elements up to which a matrix is copied to a fast dtype as a whole, and otherwise at a time."""


def image_and_back(d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """D·x (m, c) and Dᵀ·D·x (n, c) for a tall d (m, n) and x (n, c), float32.

    A block of rows is multiplied twice while it is in cache, where rows lie side by side in
    memory; else each product goes through the whole of d at once.
    """
    if d.is_cuda or not d.is_contiguous():
        image = image_of(d, x)
        return image, back_of(d, image)
    x = x.contiguous()
    image = d.new_empty(d.shape[0], x.shape[1])
    back_t = d.new_zeros(x.shape[1], d.shape[1])
    for start in range(0, d.shape[0], _ROWS):
        block = d[start : start + _ROWS]
        part = torch.mm(block, x, out=image[start : start + _ROWS])
        back_t.addmm_(part.T, block)
    return image, back_t.T


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
    """A matrix for products in a fast dtype, for directions that need no precision.

    A copy of it, or, where a copy would be large, one block of rows after the other.
    """

    def __init__(self, d: Tensor, dtype: torch.dtype, copy: Tensor | None = None):
        """copy: d in another dtype, made before, which is used if it is of ``dtype``."""
        if copy is not None and copy.dtype == dtype:
            d = copy
        self._d, self._dtype = d, dtype
        self._columns_lie_together = not d.is_contiguous() and d.T.is_contiguous()
        rows = d.shape[0]
        if d.dtype != dtype and not d.is_cuda and d.numel() > _COPIED:
            rows = max(1, min(rows, _COPIED_AT_A_TIME // d.shape[1]))
        self._step = rows
        self._buffer = None if d.dtype == dtype else self._room(rows)
        self._copied = -1

    @property
    def rows(self) -> int:
        """m, of a matrix (m, n)."""
        return len(self._d)

    def back(self, x: Tensor) -> Tensor:
        """Dᵀ·x (n, c) in float32, for x (m, c)."""
        xt = x.T.to(self._d.device, self._dtype)
        parts = (xt[:, start : start + len(d)] @ d for start, d in self._blocks())
        return _sum(parts).T

    def there_and_back(self, x: Tensor) -> Tensor:
        """Dᵀ·D·x (n, c) in float32, for x (n, c)."""
        xt = x.T.to(self._dtype)
        return _sum((xt @ d.T) @ d for _, d in self._blocks()).T

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block, and its rows in the fast dtype."""
        for start in range(0, len(self._d), self._step):
            part = self._d[start : start + self._step]
            if self._buffer is None:
                yield start, part
                continue
            if self._copied != start:
                self._copied = start
                self._buffer[: len(part)].copy_(part)
            yield start, self._buffer[: len(part)]

    def _room(self, rows: int) -> Tensor:
        """With d's own layout, so that copying does not transpose."""
        columns = self._d.shape[1]
        if self._columns_lie_together:
            return large_matrix(columns, rows, self._dtype, self._d.device).T
        return large_matrix(rows, columns, self._dtype, self._d.device)


def rough_copy(d: Tensor) -> Tensor | None:
    """Room for the copy that a RoughMatrix of ``d`` (m, n) begins with, if it does."""
    dtype = fastest_dtype(d.device)
    if d.is_cuda or dtype != torch.bfloat16 or d.numel() > _COPIED:
        return None
    return large_matrix(d.shape[0], d.shape[1], dtype, d.device)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """In float32."""
    total: Tensor | None = None
    for part in parts:
        total = part.float() if total is None else total.add_(part)
    assert total is not None, "a matrix with rows"
    return total
