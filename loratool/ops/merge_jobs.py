"""The arithmetic of a merge as jobs that any worker can run: rows of one tensor each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratool.algebra.rounding import RoundedBlock, Rounder
from loratool.errors import NonFiniteValues, RangeOverflow
from loratool.layouts.placing import PlacedUpdate, describe
from loratool.layouts.scales import ScaledBy
from loratool.ops.merge_report import MergeRow
from loratool.ops.rounders import rounder_of
from loratool.plural import counted
from loratool.storage.dtypes import BF16, F16, DType
from loratool.storage.views import Stored
from loratool.storage.writing import OutputSlot

JOB_BYTES = 128 * 2**20
BLOCK_ELEMENTS = 2**20
WAITING = 1
"""Threads beyond the workers: while one waits for the disk, another computes."""


@dataclass(frozen=True)
class Asked:
    """What is wanted beyond the merged values. lost: measure what rounding swallows, which takes a
    second pass. allow_overflow: let values beyond the dtype's range become infinite."""

    lost: bool = False
    allow_overflow: bool = False


NOTHING_MORE = Asked()


@dataclass(frozen=True)
class MergeJob:
    """Rows ``start:stop`` of one changed tensor."""

    source: Stored
    updates: tuple[PlacedUpdate, ...]
    start: int
    stop: int
    slot: OutputSlot
    device: torch.device
    asked: Asked = NOTHING_MORE
    scaled: ScaledBy | None = None

    @property
    def cost(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // max(1, self.source.rows)


def merge_rows(job: MergeJob) -> MergeRow:
    """Do it, and say what that took. Raises NonFiniteValues and RangeOverflow."""
    source, target = job.source, job.updates[0].target
    row = MergeRow(target, describe(job.updates), 0, 0, 0, 0)
    rounder = rounder_of(
        job.updates,
        source,
        job.start,
        job.stop,
        device=job.device,
        scaled=job.scaled,
    )
    columns = max(1, source.numel // max(1, source.rows))
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(job.start, job.stop, step):
        stop = min(start + step, job.stop)
        before = source.read_rows(start, stop)
        block = merge_block(
            rounder,
            before,
            start - job.start,
            job.slot.dtype,
            target,
            job.start,
            job.device,
            allow_overflow=job.asked.allow_overflow,
        )
        job.slot.write_rows(start, block.values)
        row = row.plus(
            before.numel(),
            block.changed,
            block.level2,
            block.level3,
            overflowed=block.overflowed,
        )
        if job.asked.lost and job.slot.dtype in (F16, BF16):
            lost, energy = rounding_energies(
                rounder, before, start - job.start, block.values, job.device
            )
            row = row.plus(0, 0, 0, 0, lost_energy=lost, update_energy=energy)
    return row


def rounding_energies(
    rounder: Rounder, before: Tensor, first_row: int, merged: Tensor, device: torch.device
) -> tuple[float, float]:
    """‖M − Y‖² and ‖Y − W0‖² of a block, with Y to float32. Infinite values do not count."""
    rows = before.reshape(len(before) if before.ndim else 1, -1)
    exact = rounder.add_to(rows.to(device), first_row, torch.float32).values.cpu().double()
    rounded = merged.reshape(rows.shape).double()
    finite = torch.isfinite(rounded)
    lost = ((rounded - exact)[finite]).square().sum()
    return float(lost), float(((exact - rows.double())[finite]).square().sum())


def merge_block(
    rounder: Rounder,
    before: Tensor,
    first_row: int,
    dtype: DType,
    target: str,
    counted_from: int,
    device: torch.device,
    *,
    allow_overflow: bool = False,
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
        where = f" (rows counted from {counted_from})" if counted_from else ""
        raise NonFiniteValues(f"{target}: {error.message}{where}") from None
    if block.overflowed and not allow_overflow:
        values = counted(block.overflowed, "merged value exceeds", "merged values exceed")
        raise RangeOverflow(
            f"{target}: {values} the range of {dtype.name}",
            hint="is the scale right? a smaller --scale, a wider --dtype, or --allow-overflow",
        )
    return replace(block, values=block.values.cpu().reshape(before.shape))
