"""The largest adapter that an extraction may write, from headers alone: if every tensor changed.

It is built and brought into the profile's form like the real one, of tensors that have a shape
only, so that its size is a bound and what the profile refuses is known before the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from loratool.adapter import Adapter, DenseUpdate, DoraUpdate, LowRankUpdate, ModuleKind
from loratool.errors import Unplaced
from loratool.layouts.pairs import Alignment
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_adapter import build_adapter, stored_size
from loratool.ops.extract_jobs import ExtractJob, ExtractResult, Treatment
from loratool.ops.extract_report import Status, TensorRow
from loratool.profiles import Profile, fit
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor, MemoryTensor


@dataclass(frozen=True)
class Forecast:
    """bytes_at_most: size of the tensors. notes: what the profile would refuse."""

    bytes_at_most: int
    notes: tuple[str, ...]


def forecast(
    jobs: Sequence[ExtractJob],
    alignment: Alignment,
    profile: Profile,
    task_type: str | None,
    *,
    budget: int | None,
    drop_rest: bool,
) -> Forecast:
    """What may be written at most. budget: parameters of the factors; drop_rest: of them alone."""
    results = [if_changed(job, drop_rest=drop_rest) for job in jobs]
    adapter = build_adapter(alignment, results, task_type=task_type, base_model=None)
    notes: tuple[str, ...] = ()
    try:
        adapter = fit(adapter, profile, "").adapter
    except Unplaced as error:
        named = "; ".join(error.details[:3])
        notes = (f"if all of it changed: {error}{f' ({named})' if named else ''}; {error.hint}",)
    factors = _factors_of(adapter)
    all_bytes, factor_bytes = stored_size(adapter)[1], _size(factors)
    if budget is not None:
        continued = sum(
            _size((job.start.update.a, job.start.update.b)) for job in jobs if job.start is not None
        )
        allowed = continued + budget * max((t.dtype.bits for t in factors), default=0) // 8
        if not (continued and profile.limits.one_rank):  # what is continued is padded as well
            return Forecast(all_bytes - factor_bytes + min(factor_bytes, allowed), notes)
    return Forecast(all_bytes, notes)


def if_changed(job: ExtractJob, *, drop_rest: bool = False) -> ExtractResult:
    """What a job ends with if its tensor changed, and its rule keeps the most that it may."""
    status = Status.UNCHANGED
    update: LowRankUpdate | DoraUpdate | DenseUpdate | None = None
    if not job.pair.whole.numel:
        pass  # there is nothing that could change
    elif job.treatment is Treatment.LOW_RANK:
        status, update = Status.LOW_RANK, _update(job)
    elif job.treatment is Treatment.DIFFERENCE:
        status, update = Status.DIFFERENCE, DenseUpdate(_shaped(job.pair.base.shape, job.dtype))
    elif job.treatment in (Treatment.WHOLE, Treatment.NEW_ROWS) and not drop_rest:
        status = Status.WHOLE
    row = TensorRow(job.pair.name, str(job.pair.kind), job.pair.base.shape, status)
    return ExtractResult(row, update)


def _update(job: ExtractJob) -> LowRankUpdate | DoraUpdate:
    shape = job.pair.base.shape
    rank = job.rule.most(matrix_shape(shape)) + (job.start.update.rank if job.start else 0)
    out, into = matrix_shape(shape)[:: -1 if job.input_first else 1]
    is_conv = job.pair.kind is ModuleKind.CONV
    b = _shaped((out, rank, *(1 for _ in shape[2:])) if is_conv else (out, rank), job.dtype)
    a = _shaped((rank, *shape[1:]) if is_conv else (rank, into), job.dtype)
    is_embedding = job.pair.kind is ModuleKind.EMBEDDING
    update = LowRankUpdate(b, a, job.scale, job.scale * rank, is_embedding)
    if not job.dora:
        return update
    return DoraUpdate(update, MemoryTensor(torch.empty(out, dtype=torch.float32, device="meta")))


def _shaped(shape: tuple[int, ...], dtype: DType) -> LazyTensor:
    return MemoryTensor(torch.empty(shape, dtype=dtype.torch, device="meta"))


def _factors_of(adapter: Adapter) -> list[LazyTensor]:
    return [t for update in adapter.factors.values() for t in (update.a, update.b)]


def _size(tensors: Iterable[LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) * tensor.dtype.bits // 8 for tensor in tensors)
