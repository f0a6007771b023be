"""What one pass over a tensor's values says about its health."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 32.0
"""A value this many times the tensor's RMS is an outlier. Of a billion normally distributed ones
the largest is expected at 6."""

FAR_ROW = 10.0
"""A row whose norm is this many times the median row's is an outlier."""

_FEWEST_ROWS = 8
"""With fewer rows a median says little."""


@dataclass(frozen=True)
class Health:
    """Counts of a tensor's values. largest: max |x|, and at: its row and column; rms: √(mean x²);
    both over the finite values. zero_rows: of matrices, rows that are zero throughout, none of
    whose values is NaN or infinite. saturated:
    finite values at the largest that the dtype has. far_rows: rows whose norm is more than
    ``FAR_ROW`` times the median of those that are not zero. constant: whether all values are equal.
    """

    elements: int
    rows: int
    nan: int
    infinite: int
    zero_rows: int
    saturated: int
    largest: float
    at: tuple[int, int]
    rms: float
    far_rows: int
    constant: bool

    @property
    def is_zero(self) -> bool:
        """Whether every value is zero."""
        return self.largest == 0 and not self.nan and not self.infinite

    @property
    def far(self) -> float | None:
        """The largest value over the RMS, where that makes it an outlier."""
        ratio = self.largest / self.rms if self.rms else 0.0
        return ratio if ratio > FAR else None


class HealthSums:
    """Collects a tensor's health from blocks of its rows."""

    def __init__(self) -> None:
        self._elements = self._rows = 0
        self._nan = self._infinite = self._saturated = 0
        self._energy = 0.0
        self._largest, self._at = 0.0, (0, 0)
        self._row_energies: list[Tensor] = []
        self._zero_rows = 0
        self._low, self._high = float("inf"), -float("inf")

    def add(self, block: Tensor) -> None:
        """Take in the next rows: (rows, columns), any float dtype, as stored."""
        if not block.numel():
            return
        top = torch.finfo(block.dtype).max
        values = block.double() if block.dtype == torch.float64 else block.float()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            nan = int(torch.isnan(values).sum())
            self._nan += nan
            self._infinite += int((~finite).sum()) - nan
            values = torch.where(finite, values, torch.zeros_like(values))
        magnitudes = values.abs()
        peak, where = magnitudes.reshape(-1).max(dim=0)
        if float(peak) > self._largest:
            row, column = divmod(int(where), block.shape[1])
            self._largest, self._at = float(peak), (self._rows + row, column)
        if float(peak) >= top:
            self._saturated += int((magnitudes >= top).sum())
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))
        energies = magnitudes.double().square_().sum(dim=1)
        self._energy += float(energies.sum())
        still = energies == 0  # or too small to be squared
        if bool(still.any()):
            self._zero_rows += int((block[still].double() == 0).all(dim=1).sum())
        self._row_energies.append(energies)
        self._elements += block.numel()
        self._rows += block.shape[0]

    def health(self) -> Health:
        """Of all rows so far."""
        energies = (
            torch.cat(self._row_energies)
            if self._row_energies
            else torch.zeros(0, dtype=torch.float64)
        )
        is_matrix = self._rows > 1
        alive = energies[energies > 0]
        far = 0
        if len(alive) >= _FEWEST_ROWS:
            far = int((alive > FAR_ROW**2 * alive.median()).sum())
        finite = self._elements - self._nan - self._infinite
        return Health(
            self._elements,
            self._rows,
            self._nan,
            self._infinite,
            self._zero_rows if is_matrix else 0,
            self._saturated,
            self._largest,
            self._at,
            (self._energy / finite) ** 0.5 if finite else 0.0,
            far,
            self._low == self._high and finite == self._elements,
        )
