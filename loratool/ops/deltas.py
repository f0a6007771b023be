"""The change of one tensor between base and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.blocks import large_matrix
from loratool.algebra.differences import DifferenceSums
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.lowrank import LowRank
from loratool.algebra.noise import NoiseFloor
from loratool.algebra.passes import rough_copy
from loratool.errors import NonFiniteValues, RangeOverflow
from loratool.layouts.pairs import Pair
from loratool.storage.row_reader import RowReader
from loratool.storage.tensors import LazyTensor

_BLOCK_ELEMENTS = 2**20
"""Of a block. Larger than a core's cache: threads that work side by side wait for each other
between the operations of Python, which costs more than the cache would save."""


@dataclass(frozen=True)
class Delta:
    """W − W0 as a float32 matrix; vectors as one row, kernels as (out, in·k…).

    energy: ‖D‖²_F in float64. base_norm: ‖W0‖_F. noise: what the tuned side's rounding puts into
    D. changed_share: share of entries that differ. rough: the matrix once more, as
    ``passes.RoughMatrix`` would copy it.
    """

    matrix: Tensor
    energy: float
    base_norm: float
    noise: NoiseFloor
    changed_share: float
    rough: Tensor | None = None

    @property
    def norm(self) -> float:
        """‖D‖_F."""
        return float(self.energy**0.5)

    def minus(self, update: LowRank) -> Delta:
        """What is left of the change beside an update of it, in float32."""
        b, a = update.b.float(), update.a.float()
        matrix = torch.addmm(self.matrix, b, a, alpha=-update.scale)
        return replace(self, matrix=matrix, energy=sum_of_squares(matrix), rough=None)


_NOT_NUMBERS = Delta(
    torch.zeros(1, 1, dtype=torch.float32, device="cpu"), 0.0, 0.0, NoiseFloor(0.0, 0.0), 1.0
)
"""The change of integer tensors: there is one, and it has no size."""


def read_delta(pair: Pair, device: torch.device, *, rough: bool = False) -> Delta | None:
    """The change of a pair, or None when all values are equal.

    Read and subtracted in blocks of rows, so that neither side is ever in memory whole. The
    subtraction runs in float32, in float64 where a side is float64. rough: make the copy that
    sketching begins with, which costs least now. Raises NonFiniteValues naming the tensor and the
    first index where either side is NaN or infinite, RangeOverflow where their difference is.
    """
    if not pair.base.dtype.is_float:
        return None if torch.equal(pair.base.read(), pair.tuned.read()) else _NOT_NUMBERS
    rows, columns = matrix_shape(pair.base.shape)
    matrix = large_matrix(rows, columns, torch.float32, device)
    copy = rough_copy(matrix) if rough else None
    found = _compared(pair, device, lambda start, stop: matrix[start:stop], copy)
    return None if found is None else replace(found, matrix=matrix)


def measure_delta(pair: Pair, device: torch.device) -> Delta | None:
    """As ``read_delta``, but only what is said of the change is kept: its matrix has no rows."""
    if not pair.base.dtype.is_float:
        return read_delta(pair, device)
    _, columns = matrix_shape(pair.base.shape)
    block = torch.empty(_block_rows(pair.base), columns, dtype=torch.float32, device=device)
    return _compared(pair, device, lambda start, stop: block[: stop - start])


def _block_rows(tensor: LazyTensor) -> int:
    rows, columns = matrix_shape(tensor.shape)
    return max(1, min(rows, _BLOCK_ELEMENTS // max(1, columns)))


def _compared(
    pair: Pair,
    device: torch.device,
    target: Callable[[int, int], Tensor],
    rough: Tensor | None = None,
) -> Delta | None:
    """What is said of the change, with a matrix of no rows; ``target`` is where D's rows start:stop
    are put."""
    rows, columns = matrix_shape(pair.base.shape)
    step = _block_rows(pair.base)
    read_base, read_tuned = (_reader(side, step, device) for side in (pair.base, pair.tuned))
    sums: DifferenceSums | None = None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        before, after = read_base(start, stop), read_tuned(start, stop)
        sums = sums or DifferenceSums(columns, before.dtype, after.dtype)
        block = target(start, stop)
        if not sums.add(before, after, block, None if rough is None else rough[start:stop]):
            raise _not_finite(pair, start, (before, after), block)
    energy = sums.energy if sums is not None else 0.0
    if sums is None or energy == 0:
        return None
    share = sums.changed / (rows * columns)
    nothing = torch.empty(0, columns, dtype=torch.float32, device=device)
    return Delta(nothing, energy, sums.base_energy**0.5, sums.noise(), share, rough)


def _not_finite(
    pair: Pair, first_row: int, sides: tuple[Tensor, Tensor], block: Tensor
) -> NonFiniteValues | RangeOverflow:
    row, column = torch.nonzero(~torch.isfinite(block))[0].tolist()
    flat = (first_row + row) * block.shape[1] + column
    index = [int(part) for part in np.unravel_index(flat, pair.base.shape)]
    at_fault = [
        name
        for name, side in zip(("base", "tuned"), sides, strict=True)
        if not bool(torch.isfinite(side[row, column].double()))
    ]
    if not at_fault:
        return RangeOverflow(
            f"{pair.name}: the change at {index} is beyond float32's range",
            hint="no adapter can hold it; are these checkpoints of one model?",
        )
    return NonFiniteValues(
        f"{pair.name}: NaN or infinity at {index} in {' and '.join(at_fault)}",
        hint="the checkpoint is broken, or its training diverged; inspect --level values of one "
        "checkpoint counts such values, and extract --exclude leaves the tensor out",
    )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """As a matrix: vectors are one row, kernels (out, in, k…) have in·k… columns."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def read_matrix(tensor: LazyTensor, device: torch.device) -> Tensor:
    """A whole tensor as ``matrix_shape`` has it, float32, read in blocks of rows."""
    rows, columns = matrix_shape(tensor.shape)
    matrix = large_matrix(rows, columns, torch.float32, device)
    step = _block_rows(tensor)
    read = _reader(tensor, step, device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        matrix[start:stop] = read(start, stop)
    return matrix


def _reader(
    tensor: LazyTensor, most_rows: int, device: torch.device
) -> Callable[[int, int], Tensor]:
    """Rows of the tensor as a matrix, on the device."""
    _, columns = matrix_shape(tensor.shape)
    if len(tensor.shape) < 2:
        return lambda _start, _stop: tensor.read().reshape(1, columns).to(device)
    rows = RowReader(tensor, most_rows)
    if len(tensor.shape) == 2 and device.type == "cpu":
        return rows
    return lambda start, stop: rows(start, stop).reshape(stop - start, columns).to(device)


def check_finite_rows(pair: Pair) -> None:
    """Raises NonFiniteValues where a token that the tuned side added holds NaN or infinity."""
    first, last = pair.tuned.rows, pair.whole.rows
    step = max(1, _BLOCK_ELEMENTS * last // max(1, pair.whole.numel))
    for start in range(first, last, step):
        rows = pair.whole.read_rows(start, min(start + step, last))
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteValues(
                f"{pair.name}: NaN or infinity in the tokens from {start} on of tuned",
                hint="the checkpoint is broken, or its training diverged",
            )
