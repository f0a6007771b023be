"""Matrices too large to hold, known by blocks of rows that are made when asked for.

A block depends on the matrix's shape only, not on threads or passes, so that every pass sees the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank

BLOCK_ELEMENTS = 2**19
"""Elements per block."""

HELD_BYTES = 2**27
"""A result up to this size is kept between passes instead of being made again."""

_HALF = 16
_MASK = (1 << _HALF) - 1


class RowBlocks:
    """A float32 matrix (rows, columns), a block of rows at a time.

    make: from the first and the last row (excluded) to those rows, float32, on ``device``.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        make: Callable[[int, int], Tensor],
    ):
        self.shape = shape
        self.device = device
        self._make = make

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Every block with the rows it covers, in order."""
        rows, columns = self.shape
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        for start in range(0, rows, step):
            where = slice(start, min(start + step, rows))
            yield where, self._make(where.start, where.stop)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop``."""
        return self._make(start, stop)

    def held(self) -> RowBlocks:
        """The same matrix, kept in memory where it is small enough for that."""
        if 4 * self.shape[0] * self.shape[1] > HELD_BYTES:
            return self
        whole = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for where, block in self:
            whole[where] = block
        return RowBlocks(self.shape, self.device, lambda start, stop: whole[start:stop])


def dense(value: LowRank) -> RowBlocks:
    """The matrix of an update: products in float64, rounded to float32."""
    b, a = value.b.double() * value.scale, value.a.double()
    return RowBlocks(value.shape, b.device, lambda start, stop: (b[start:stop] @ a).float())


def map_rows(matrices: Sequence[RowBlocks], combine: Callable[..., Tensor]) -> RowBlocks:
    """``combine(start, *blocks)`` of the same rows of several matrices of one shape."""
    first = matrices[0]
    return RowBlocks(
        first.shape,
        first.device,
        lambda start, stop: combine(start, *(m.rows(start, stop) for m in matrices)),
    )


def magnitudes_at(matrix: RowBlocks, positions: Sequence[int]) -> list[float]:
    """The elements at these positions of all |elements| in ascending order, exactly.

    The bits of a float32 magnitude sort as it does: one pass counts the upper halves, a second the
    lower halves within those that hold the positions. Memory: 2¹⁶ counters per position.
    """
    uppers = torch.zeros(1 << _HALF, dtype=torch.int64, device=matrix.device)
    for _, block in matrix:
        uppers += torch.bincount(_bits(block) >> _HALF, minlength=1 << _HALF)
    found = [_place(uppers, position) for position in positions]
    lowers = {upper: torch.zeros_like(uppers) for upper, _ in found}
    for _, block in matrix:
        bits = _bits(block)
        for upper, counts in lowers.items():
            inside = bits[(bits >> _HALF) == upper] & _MASK
            counts += torch.bincount(inside, minlength=1 << _HALF)
    exact = [
        upper << _HALF | _place(lowers[upper], position - before)[0]
        for position, (upper, before) in zip(positions, found, strict=True)
    ]
    return torch.tensor(exact, dtype=torch.int32).view(torch.float32).tolist()


def _bits(block: Tensor) -> Tensor:
    return block.abs().contiguous().view(torch.int32).flatten()


def _place(counts: Tensor, position: int) -> tuple[int, int]:
    """(the bin that holds the position-th element, how many lie in the bins before it)."""
    running = counts.cumsum(0)
    place = int(torch.searchsorted(running, position, right=True))
    return place, int(running[place - 1]) if place else 0
