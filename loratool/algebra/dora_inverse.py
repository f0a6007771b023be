"""DoRA taken off again, given the norms that went into it.

With c = w·m/‖W0 + s·B·A‖ for each line, the merged line is W′ = (1 − w + c)·W0 + c·s·B·A, so

    W0 = (W′ − c·s·B·A) / (1 − w + c).

This is evaluated in float64, value by value and without sums, from s·B·A correctly rounded to
float32; so the result, which is close to W0 but not promised to be it, is the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.rounding import RoundedBlock, Rounder, round_once


class DoraInverse:
    """The base's rows as they follow from merged ones.

    change: adds s·B·A. magnitude, norms: float64, one for each row (column, where by_column) of
    the tensor; NaN magnitudes for lines that the update leaves alone.
    """

    def __init__(
        self, change: Rounder, magnitude: Tensor, norms: Tensor, weight: float, by_column: bool
    ):
        self._change = change
        self._by_column = by_column
        factor = weight * magnitude / norms
        kept = 1 - weight + factor
        usable = torch.isfinite(factor) & (kept != 0)
        self._gain = torch.where(usable, 1 / kept, 1.0)
        self._share = torch.where(usable, factor / kept, 0.0)

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """w0: merged rows, the first of which is the tensor's row ``first_row``."""
        merged = w0.cpu()
        change = change_of(self._change, merged.shape, first_row)
        lines = slice(first_row, first_row + len(merged))
        gain, share = (
            values[None] if self._by_column else values[lines][:, None]
            for values in (self._gain, self._share)
        )
        taken = share * change
        values = gain * merged.double() - taken
        values = torch.where(torch.isfinite(values), values, 0.0)
        return RoundedBlock(round_once(values, dtype), 0, 0, 0, 0)


def change_of(change: Rounder, shape: torch.Size, first_row: int) -> Tensor:
    """s·B·A of these rows, rounded to float32, as float64."""
    return change.add_to(
        torch.zeros(shape, dtype=torch.float32), first_row, torch.float32
    ).values.double()


def add_squares(
    norms: Tensor, rows: Tensor, change: Tensor, first_row: int, by_column: bool
) -> None:
    """Add the squares of V = rows + change to the squared norms of their lines, in place."""
    squares = (rows.double() + change).square()
    if by_column:
        norms += squares.sum(dim=0)
    else:
        norms[first_row : first_row + len(rows)] = squares.sum(dim=1)
