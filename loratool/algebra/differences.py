"""The change between two sides, block by block of rows, with what is said of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.energies import column_squares, row_squares, total
from loratool.algebra.noise import NoiseFloor, NoiseSums, has_rounding, powers
from loratool.algebra.row_kernels import compare


class DifferenceSums:
    """Takes blocks of rows of two sides, in order, and sums up what their difference is like.

    The subtraction runs in float32, in float64 where a side is float64, and sums in float64. The
    compiled loop and the plain one give the same bits.
    """

    def __init__(self, columns: int, before: torch.dtype, after: torch.dtype):
        """before, after: the dtypes of both sides."""
        self._dtype = after
        self._noise = NoiseSums(columns, after)
        self._loop = compare(before, after)
        self._energies: list[np.ndarray] = [np.zeros((2, 1))]
        self._single = self._rough = torch.empty(0, dtype=torch.float32)
        self._changed = 0

    def add(
        self, before: Tensor, after: Tensor, change: Tensor, rough: Tensor | None = None
    ) -> bool:
        """Take in the next rows and write their difference to ``change``, float32, and where it
        is asked for to ``rough``, bfloat16.

        Whether all of it is finite.
        """
        if not change.numel():
            return True
        if self._loop is None or change.device.type != "cpu":
            finite = self._add_plainly(before, after, change)
            if rough is not None:
                rough.copy_(change)
            return finite
        if rough is None:  # the loop writes it all the same
            if self._rough.shape != change.shape:
                self._rough = torch.empty_like(change, dtype=torch.bfloat16)
            rough = self._rough
        sums, columns = np.empty((3, len(change))), np.zeros(change.shape[1])
        self._changed += self._loop(before, after, change, rough, columns, sums)
        self._noise.add(sums[2], columns)
        return self._finite(sums[:2])

    def _add_plainly(self, before: Tensor, after: Tensor, change: Tensor) -> bool:
        if self._single.shape != change.shape:  # fresh memory for each block would cost more
            self._single = torch.empty_like(change)
        change.copy_(after)
        if has_rounding(self._dtype):
            power = powers(change, self._dtype, out=self._single)
            self._noise.add(row_squares(power), column_squares(power))
        single = self._single.copy_(before)
        if torch.float64 in (before.dtype, after.dtype):
            change.copy_(after.double() - before.double())
        else:
            change.sub_(single)
        self._changed += _count_nonzero(change)
        return self._finite(np.stack([row_squares(side) for side in (change, single)]))

    def _finite(self, energies: np.ndarray) -> bool:
        self._energies.append(energies)
        return bool(np.isfinite(energies[0]).all())

    @property
    def energy(self) -> float:
        """‖W − W0‖²_F."""
        return self._total(0)

    @property
    def base_energy(self) -> float:
        """‖W0‖²_F."""
        return self._total(1)

    def _total(self, which: int) -> float:
        return total(np.concatenate([energies[which] for energies in self._energies]))

    @property
    def changed(self) -> int:
        """Entries that differ."""
        return self._changed

    def noise(self) -> NoiseFloor:
        """What the rounding of the second side puts into the difference."""
        return self._noise.floor()


def _count_nonzero(block: Tensor) -> int:
    if block.device.type != "cpu":
        return int(torch.count_nonzero(block))
    return int(np.count_nonzero(block.numpy() != 0))  # numpy counts flags several times faster
