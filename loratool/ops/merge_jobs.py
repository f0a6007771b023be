"""The work of a merge, as jobs that any worker can run: rows of a tensor, and ranges to copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loratool.adapter import LowRankUpdate, Replacement
from loratool.algebra.kernels import decide_bf16_when_loaded
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import CertifiedSum
from loratool.errors import NonFiniteValues, RangeOverflow, UnsupportedInput
from loratool.layouts.placing import PlacedUpdate
from loratool.ops.merge_report import MergeRow
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.writing import OutputSlot, copy_range

JOB_BYTES = 128 * 2**20
BLOCK_ELEMENTS = 2**20
COMPILE_ELEMENTS = 10**9
"""From this many changed weights on, loading the compiled pass pays."""


@dataclass(frozen=True)
class MergeJob:
    """Rows ``start:stop`` of one changed tensor."""

    source: TensorInfo
    update: PlacedUpdate
    start: int
    stop: int
    slot: OutputSlot
    device: torch.device
    compiled: bool

    @property
    def cost(self) -> int:
        return self.source.nbytes * (self.stop - self.start) // max(1, self.source.rows)


@dataclass(frozen=True)
class CopyJob:
    """A byte range that does not change, or a pickled tensor that is only rewritten."""

    source: TensorInfo
    nbytes: int
    slot: OutputSlot

    @property
    def cost(self) -> int:
        return self.nbytes


def run_job(job: MergeJob | CopyJob) -> MergeRow | None:
    """Copy unchanged bytes, or merge rows and say what that took."""
    if isinstance(job, CopyJob):
        if job.source.strides is None:
            copy_range(
                job.source.path, job.source.offset, job.slot.path, job.slot.offset, job.nbytes
            )
        else:
            job.slot.write(job.source.read())
        return None
    return _merge_rows(job)


def _merge_rows(job: MergeJob) -> MergeRow:
    update = job.update
    row = MergeRow(update.target, update.describe(), 0, 0, 0, 0)
    source = job.source
    dtype = source.dtype.torch
    assert dtype is not None
    summed = _certified(job) if isinstance(update.update, LowRankUpdate) else None
    columns = max(1, source.numel // max(1, source.rows))
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(job.start, job.stop, step):
        stop = min(start + step, job.stop)
        before = source.read_rows(start, stop)
        if summed is None:
            assert isinstance(update.update, Replacement)
            after = _replacement_rows(job, update.update.value, start, stop)
            row = row.plus(before.numel(), int((before != after).sum()), 0, 0)
        else:
            try:
                rows = before.flatten(1).to(job.device)
                block = summed.add_to(rows, start - job.start, dtype)
            except NonFiniteValues as error:
                raise NonFiniteValues(
                    f"{update.target}: {error.message} (rows counted from {job.start})"
                ) from None
            if block.overflowed:
                raise RangeOverflow(
                    f"{update.target}: {block.overflowed} merged values exceed the range of "
                    f"{source.dtype.name}",
                    hint="is the scale right? a smaller --scale, or a base in a wider dtype",
                )
            after = block.values.cpu().reshape(before.shape)
            row = row.plus(before.numel(), block.changed, block.level2, block.level3)
        job.slot.write_rows(start, after)
    return row


def _certified(job: MergeJob) -> CertifiedSum:
    update = job.update.update
    assert isinstance(update, LowRankUpdate)
    value = update.load()
    value = value.T if job.update.transposed else value
    part = value.rows(job.start, job.stop)
    scaled = LowRank(part.b.to(job.device), part.a.to(job.device), part.scale * job.update.weight)
    try:
        return CertifiedSum([scaled], find_pass=decide_bf16_when_loaded if job.compiled else _plain)
    except (NonFiniteValues, UnsupportedInput) as error:
        raise type(error)(f"{job.update.source}: {error.message}") from None


def _plain() -> None:
    """No compiled pass: for a small merge, loading it takes longer than it saves."""


def _replacement_rows(job: MergeJob, value: LazyTensor, start: int, stop: int) -> torch.Tensor:
    rows = value.read_rows(start, stop)
    dtype = job.source.dtype.torch
    assert dtype is not None
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteValues(f"{job.update.source}: the adapter holds NaN or infinity")
    merged = rows.to(dtype)
    if not bool(torch.isfinite(merged).all()):
        raise RangeOverflow(f"{job.update.source}: values exceed the range of {dtype}")
    return merged
