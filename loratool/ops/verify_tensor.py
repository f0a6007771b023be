"""One tensor of a merged checkpoint against what it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from loratool.algebra.rounding import round_once
from loratool.errors import NonFiniteValues
from loratool.ops.restoring import byte_parts
from loratool.ops.verify_diagnosis import can_be_diagnosed, diagnosed
from loratool.ops.verify_row import Cause, Status, VerifyJob, VerifyRow
from loratool.receipt import bit_patterns


def verify_tensor(job: VerifyJob) -> VerifyRow:
    """Compare a tensor with what it should be; where it differs, find out why.

    Raises NonFiniteValues naming the tensor.
    """
    try:
        return _verify_updated(job) if job.updates else _verify_unchanged(job)
    except NonFiniteValues as error:
        raise NonFiniteValues(f"{job.name}: {error.message}") from None


def _verify_updated(job: VerifyJob) -> VerifyRow:
    if not job.is_comparable:
        detail = f"{job.base.dtype.name} in the base, {job.merged.dtype.name} merged"
        return VerifyRow(job.name, job.update, Status.SHAPE, job.elements, 0, detail=detail)
    seen = _compare(job)
    row = VerifyRow(
        job.name,
        job.update,
        Status.EQUAL,
        job.elements,
        seen.checked,
        seen.different,
        worst=seen.worst,
        worst_at=seen.worst_at,
    )
    if not seen.different:
        return row
    if not can_be_diagnosed(job):
        return replace(row, status=Status.OFF, beyond=seen.different, cause=Cause.OTHER)
    return diagnosed(job, row)


@dataclass
class _Seen:
    checked: int = 0
    different: int = 0
    worst: float = 0.0
    worst_at: tuple[int, ...] = ()

    def add(self, ours: Tensor, theirs: Tensor, start: int) -> None:
        """Take in a block: what it should be and what it is, from row ``start`` on."""
        one, two = bit_patterns(ours), bit_patterns(theirs)
        self.checked += one.size
        wrong = np.flatnonzero(one != two)
        if not len(wrong):
            return
        self.different += len(wrong)
        gap = (ours.reshape(-1)[wrong].double() - theirs.reshape(-1)[wrong].double()).abs()
        gap = torch.nan_to_num(gap, nan=math.inf)
        if float(gap.max()) > self.worst or not self.worst_at:
            self.worst = float(gap.max())
            where = np.unravel_index(int(wrong[int(gap.argmax())]), theirs.shape or (1,))
            first, *rest = (int(index) for index in where)
            self.worst_at = (start + first, *rest)


def _compare(job: VerifyJob) -> _Seen:
    seen, rounder = _Seen(), job.rounder()
    dtype = job.merged.dtype.torch
    assert dtype is not None
    for start, stop in job.blocks():
        before = job.base.read_rows(start, stop)
        flat = before.reshape(stop - start, -1).to(job.device)
        ours = rounder.add_to(flat, start, dtype).values.cpu().reshape(before.shape)
        seen.add(ours, job.merged.read_rows(start, stop), start)
    return seen


def _verify_unchanged(job: VerifyJob) -> VerifyRow:
    row = VerifyRow(job.name, "", Status.EQUAL, job.elements, job.elements)
    same_dtype = job.base.dtype == job.merged.dtype
    if job.base.dtype.torch is None or not (same_dtype or job.base.dtype.is_float):
        pairs = zip(byte_parts(job.base), byte_parts(job.merged), strict=True)
        equal = same_dtype and all(one == two for one, two in pairs)
        return row if equal else replace(row, status=Status.CHANGED, different=job.elements)
    seen = _Seen()
    for start, stop in job.blocks():
        before, after = job.base.read_rows(start, stop), job.merged.read_rows(start, stop)
        seen.add(round_once(before, after.dtype), after, start)
    return replace(
        row,
        status=Status.CHANGED if seen.different else Status.EQUAL,
        checked=seen.checked,
        different=seen.different,
        worst=seen.worst,
        worst_at=seen.worst_at,
    )
