"""What a merge does to tensors that no update changes: copy their bytes, or change their dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loratool.algebra.rounding import round_once
from loratool.errors import RangeOverflow
from loratool.ops.merge_report import MergeRow
from loratool.plural import counted
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Stored
from loratool.storage.writing import OutputSlot, copy_range

_BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class CopyJob:
    """A byte range that does not change, or a pickled tensor that is only rewritten."""

    source: TensorInfo
    nbytes: int
    slot: OutputSlot

    @property
    def cost(self) -> int:
        return self.nbytes

    def run(self) -> None:
        source = self.source
        if source.strides is None:
            copy_range(source.path, source.offset, self.slot.path, self.slot.offset, self.nbytes)
        else:
            self.slot.write(source.read())


@dataclass(frozen=True)
class ConvertJob:
    """Rows ``start:stop`` of a tensor that gets another dtype, each value rounded once."""

    name: str
    source: Stored
    start: int
    stop: int
    slot: OutputSlot
    allow_overflow: bool = False

    @property
    def cost(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // max(1, self.source.rows)

    def run(self) -> MergeRow | None:
        """A row only where values became infinite, else RangeOverflow if that is not allowed.

        Infinity and NaN stay what they are.
        """
        row = MergeRow(self.name, f"converted to {self.slot.dtype.name}", 0, 0, 0, 0)
        dtype = self.slot.dtype.torch
        assert dtype is not None
        step = max(1, _BLOCK_ELEMENTS * self.source.rows // max(1, self.source.numel))
        for start in range(self.start, self.stop, step):
            before = self.source.read_rows(start, min(start + step, self.stop))
            after = round_once(before, dtype)
            overflowed = int((torch.isinf(after) & torch.isfinite(before)).sum())
            if overflowed and not self.allow_overflow:
                raise RangeOverflow(
                    f"{self.name}: {counted(overflowed, 'value exceeds', 'values exceed')} the "
                    f"range of {self.slot.dtype.name}",
                    hint="choose a wider --dtype, or --allow-overflow",
                )
            self.slot.write_rows(start, after)
            row = row.plus(after.numel(), 0, 0, 0, overflowed=overflowed)
        return row if row.overflowed else None
