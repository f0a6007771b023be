"""The arithmetic of a merge as jobs that any worker can run: rows of one tensor each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratool.algebra.rounding import RoundedBlock, Rounder
from loratool.errors import NonFiniteValues, RangeOverflow
from loratool.layouts.placing import PlacedUpdate, describe
from loratool.ops.merge_report import MergeRow
from loratool.ops.rounders import rounder_of
from loratool.storage.dtypes import DType
from loratool.storage.views import Stored
from loratool.storage.writing import OutputSlot

JOB_BYTES = 128 * 2**20
BLOCK_ELEMENTS = 2**20
WAITING = 2
"""Threads beyond the workers: while one waits for the disk, another computes."""
COMPILE_ELEMENTS = 10**9
"""From this many changed weights on, loading the compiled pass pays."""


@dataclass(frozen=True)
class MergeJob:
    """Rows ``start:stop`` of one changed tensor."""

    source: Stored
    updates: tuple[PlacedUpdate, ...]
    start: int
    stop: int
    slot: OutputSlot
    device: torch.device
    compiled: bool

    @property
    def cost(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // max(1, self.source.rows)


def merge_rows(job: MergeJob) -> MergeRow:
    """Do it, and say what that took. Raises NonFiniteValues and RangeOverflow."""
    source, target = job.source, job.updates[0].target
    row = MergeRow(target, describe(job.updates), 0, 0, 0, 0)
    rounder = rounder_of(
        job.updates, source, job.start, job.stop, device=job.device, compiled=job.compiled
    )
    columns = max(1, source.numel // max(1, source.rows))
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(job.start, job.stop, step):
        stop = min(start + step, job.stop)
        before = source.read_rows(start, stop)
        block = merge_block(
            rounder, before, start - job.start, job.slot.dtype, target, job.start, job.device
        )
        job.slot.write_rows(start, block.values)
        row = row.plus(before.numel(), block.changed, block.level2, block.level3)
    return row


def merge_block(
    rounder: Rounder,
    before: Tensor,
    first_row: int,
    dtype: DType,
    target: str,
    counted_from: int,
    device: torch.device,
) -> RoundedBlock:
    """A block of rows merged, its values on the CPU in the shape of ``before``.

    first_row: by the rounder's count, whose row 0 is the tensor's row ``counted_from``. Raises
    NonFiniteValues and RangeOverflow naming ``target``.
    """
    assert dtype.torch is not None
    try:
        rows = before.reshape(len(before) if before.ndim else 1, -1).to(device)
        block = rounder.add_to(rows, first_row, dtype.torch)
    except NonFiniteValues as error:
        raise NonFiniteValues(
            f"{target}: {error.message} (rows counted from {counted_from})"
        ) from None
    if block.overflowed:
        raise RangeOverflow(
            f"{target}: {block.overflowed} merged values exceed the range of {dtype.name}",
            hint="is the scale right? a smaller --scale, or a base in a wider dtype",
        )
    return replace(block, values=block.values.cpu().reshape(before.shape))
