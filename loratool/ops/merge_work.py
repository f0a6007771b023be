"""The work of a merge as a list: rows to merge, ranges to copy, tensors to convert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratool.ops.merge_copies import ConvertJob, CopyJob
from loratool.ops.merge_inputs import Merging
from loratool.ops.merge_jobs import JOB_BYTES, MergeJob, merge_rows
from loratool.ops.merge_layout import OutFile, OutTensor
from loratool.ops.merge_report import MergeRow
from loratool.storage.tensors import TensorInfo

Job = MergeJob | CopyJob | ConvertJob


@dataclass(frozen=True)
class Work:
    """A job, and the name by which a log of finished work knows it."""

    key: str
    job: Job


def run_job(job: Job) -> MergeRow | None:
    """Do it; of rows whose values changed, say what that took."""
    if isinstance(job, MergeJob):
        return merge_rows(job)
    return job.run()


def list_work(file: OutFile, path: Path, merging: Merging) -> Iterator[Work]:
    """What fills the file at ``path``, whose header is there already."""
    for job in _jobs(file, path, merging):
        start = getattr(job, "start", 0)
        yield Work(f"{file.name}@{job.slot.offset}+{start}", job)


def _jobs(file: OutFile, path: Path, merging: Merging) -> Iterator[Job]:
    updates, asked = merging.updates, merging.asked
    pending: CopyJob | None = None
    for tensor in file.tensors:
        name, source, slot = tensor.name, tensor.source, tensor.slot(path)
        if name in updates:
            for start, stop in row_ranges(tensor, JOB_BYTES):
                yield MergeJob(
                    source,
                    updates[name],
                    start,
                    stop,
                    slot,
                    merging.device,
                    asked,
                    merging.scaled.get(name),
                )
        elif tensor.dtype != source.dtype:
            for start, stop in row_ranges(tensor, JOB_BYTES):
                yield ConvertJob(name, source, start, stop, slot, asked.allow_overflow)
        elif tensor.nbytes:
            assert isinstance(source, TensorInfo)
            if pending and _continues(pending, tensor):
                pending = replace(pending, nbytes=pending.nbytes + tensor.nbytes)
                continue
            if pending:
                yield pending
            pending = CopyJob(source, tensor.nbytes, slot)
    if pending:
        yield pending


def row_ranges(tensor: OutTensor, most_bytes: int) -> Sequence[tuple[int, int]]:
    """The tensor's rows in runs of about ``most_bytes`` of the base."""
    rows = tensor.source.rows
    step = max(1, most_bytes * rows // max(1, tensor.source.nbytes))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _continues(job: CopyJob, tensor: OutTensor) -> bool:
    source = tensor.source
    assert isinstance(source, TensorInfo)
    return (
        job.source.path == source.path
        and job.source.strides is None
        and source.strides is None
        and source.offset == job.source.offset + job.nbytes
        and tensor.offset == job.slot.offset + job.nbytes
        and job.nbytes < JOB_BYTES
    )
