"""Sums of squares in float64, in an order that is stated, so that compiled loops make the same.

A row's squares go in turn to ``LANES`` running sums; then the second half of these is added to the
first, until one is left. Sums over rows are exact before they are rounded once (``math.fsum``), so
nothing depends on how many rows are looked at together.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.blocks import float64_blocks
from loratool.algebra.row_kernels import LANES, squares


def sum_of_squares(d: Tensor) -> float:
    """‖d‖²_F of a matrix."""
    if not d.is_contiguous() and d.T.is_contiguous():
        d = d.T
    return total(row_energies(d))


def total(rows: np.ndarray) -> float:
    """Their sum; NaN or infinity where one of them is."""
    return math.fsum(rows) if np.isfinite(rows).all() else float(rows.sum())


def row_energies(x: Tensor, minus: Tensor | None = None) -> np.ndarray:
    """Σx² of each row of a matrix, or Σ(x − minus)²: (rows,) float64.

    Differences and squares are taken in float64.
    """
    given = [x] if minus is None else [x, minus]
    loop = None
    if x.device.type == "cpu" and x.numel():
        loop = squares(*(part.dtype for part in given))
    if loop is not None:
        sums = np.empty(len(x))
        loop([part.contiguous() for part in given], sums)
        return sums
    if minus is None and x.dtype == torch.float32:
        return row_squares(x.contiguous())
    parts = [np.empty(0)]
    for start, block in float64_blocks(x):
        if minus is not None:
            block.sub_(minus[start : start + len(block)])
        parts.append(row_squares(block))
    return np.concatenate(parts)


def row_squares(values: Tensor) -> np.ndarray:
    """Σx² of each row without a compiled loop: (rows,) float64.

    values: contiguous, float32 or float64. On a GPU the order is its own.
    """
    if values.device.type != "cpu":
        elsewhere: np.ndarray = values.double().square_().sum(1).cpu().numpy()
        return elsewhere
    rows, columns = values.shape
    given, rest = values.numpy(), columns % LANES
    grouped = given[:, : columns - rest].reshape(rows, columns // LANES, LANES)
    last = given[:, columns - rest :].astype(np.float64)
    # Along an axis that is not the last, numpy adds one after the other.
    if values.dtype == torch.float32:  # squares are exact in float64
        lanes: np.ndarray = np.einsum("ijk,ijk->ik", grouped, grouped, dtype=np.float64)
    else:
        lanes = np.add.reduce(np.square(grouped), axis=1)
    lanes[:, :rest] += np.square(last)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def column_squares(values: Tensor) -> np.ndarray:
    """Σx² of each column, one row after the other, without a compiled loop: (columns,) float64.

    values: contiguous, float32. On a GPU the order is its own.
    """
    if values.device.type != "cpu":
        elsewhere: np.ndarray = values.double().square_().sum(0).cpu().numpy()
        return elsewhere
    given = values.numpy()
    sums: np.ndarray = np.einsum("ij,ij->j", given, given, dtype=np.float64)
    return sums
