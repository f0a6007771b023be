"""One adapter out of a merged checkpoint and another in, in one pass and exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import DisagreementError, InputMissing, UsageError
from loratool.layouts.placing import PlacedUpdate, TieChoice, describe
from loratool.layouts.scales import ScaledBy
from loratool.ops.merge_inputs import Merging, plan_merging
from loratool.ops.merge_jobs import merge_block
from loratool.ops.merge_receipt import plan_receipt, receipt_facts, receipt_place
from loratool.ops.merge_report import MergeReport, MergeRow
from loratool.ops.merge_sides import hashes_of
from loratool.ops.restoring import Recorder, RestoredTensor, guess_for_record, value_sha256
from loratool.ops.rounders import rounder_of
from loratool.ops.sources import needs_alpha
from loratool.ops.unmerge import (
    RestoreJob,
    UnmergePlan,
    check_merged,
    check_restored,
    plan_unmerge,
    restore_tensor,
    write_beside,
)
from loratool.provenance import document
from loratool.receipt import (
    AdapterRecord,
    Receipt,
    TensorRecord,
    bit_patterns,
    blocks_of,
    write_receipt,
)
from loratool.storage.outputs import check_output, staged
from loratool.storage.tensors import LazyTensor, equal_values
from loratool.storage.writing import create_with_header

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SwapPlan:
    """unmerge: how the base is restored. merging: what goes in. receipt: where the new one goes."""

    unmerge: UnmergePlan
    merging: Merging
    receipt: Path

    @property
    def notes(self) -> list[str]:
        """What is said of either half, once."""
        return list(dict.fromkeys((*self.unmerge.notes, *self.merging.notes)))

    def to_json(self) -> dict[str, Any]:
        return {
            "output_bytes": self.unmerge.output_bytes,
            "receipt": self.receipt.name,
            "restored": sorted(self.unmerge.updates),
            "changed": sorted(self.merging.placement.updates),
            "device": str(self.merging.device),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class SwapReport:
    """A swap's outcome. merged: what went in, as merge reports it."""

    merged: MergeReport
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        body = {k: v for k, v in self.merged.to_json().items() if k in ("totals", "tensors")}
        return document("swap", SCHEMA_VERSION, {**self.facts, **body})


@dataclass(frozen=True)
class _SwapJob:
    """A tensor: how it is restored, what is then merged into it, where corrections are parked."""

    restore: RestoreJob
    updates: tuple[PlacedUpdate, ...]
    device: torch.device
    parked: Path
    scaled: ScaledBy | None

    @property
    def cost(self) -> int:
        return self.restore.cost


def plan_swap(
    merged: Path,
    remove: Sequence[tuple[Path, float]],
    add: Sequence[tuple[Path, float]],
    output: Path,
    *,
    receipt: Path | None = None,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tied: bool = False,
    overwrite: bool = False,
) -> SwapPlan:
    """Check everything that unmerge and merge would check. Nothing is written.

    include, exclude: which of the updates of ``add`` are merged. tied: whether an update of one
    side of a tied embedding and head changes both.
    Raises InputMissing without a receipt, UsageError where the base has another layout than the
    merged checkpoint, and what plan_unmerge and plan_merging raise.
    """
    if not add:
        raise UsageError("no adapter to add", hint="to take one out only, use unmerge")
    alpha_in = alpha if alpha is not None and any(needs_alpha(path) for path, _ in add) else None
    if alpha_in is not None and not any(needs_alpha(path) for path, _ in remove):
        alpha = None
    out = plan_unmerge(
        merged, remove, output, receipt=receipt, alpha=alpha, device=device, overwrite=overwrite
    )
    if out.receipt is None:
        raise InputMissing(
            f"{merged}: has no receipt, without which the swap could not be exact",
            hint="name it with --receipt; or unmerge to the nearest base, then merge",
        )
    check_output(output, overwrite=overwrite, inputs=[path for path, _ in add])
    _check_same_layout(out)
    merging = plan_merging(
        out.merged,
        add,
        alpha=alpha_in,
        device=device,
        include=include,
        exclude=exclude,
        ties=TieChoice.BOTH if tied else TieChoice.REFUSE,
        holds_base=False,
    )
    if merging.placement.added:
        raise UsageError(
            "the adapter adds biases that the base does not have", hint="use unmerge, then merge"
        )
    inputs = [path for path, _ in (*remove, *add)]
    place = plan_receipt(True, out.merged, output, overwrite=overwrite, adapters=inputs)
    assert place is not None
    return SwapPlan(out, merging, place)


def run_swap(
    plan: SwapPlan, engine: Engine | None = None, progress: Progress | None = None
) -> SwapReport:
    """Restore, merge and record each tensor in turn; publish.

    Raises what run_unmerge and run_merge raise.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    out, merging = plan.unmerge, plan.merging
    assert out.receipt is not None
    with staged(out.output) as staging:
        for file in out.files:
            create_with_header(staging.out / file.name, file.header, file.size)
        restores = out.jobs(staging.out)
        _check_base_copies(merging, restores)
        jobs = [
            _SwapJob(
                restore,
                merging.placement.updates.get(restore.name, ()),
                merging.device,
                staging.scratch / f"corrections-{index}",
                merging.scaled.get(restore.name),
            )
            for index, restore in enumerate(restores)
        ]
        done = engine.map(
            _swap_tensor, jobs, cost=lambda job: job.cost, progress=progress, what="swapping"
        )
        only_file = out.files[0].name if out.writes_single_file else None
        if only_file is None:
            write_beside(staging.out, out.merged, out.receipt, out.side_files)
        receipt = Receipt(
            tuple(_record_of(merging)),
            out.receipt.files,
            {job.restore.name: record for job, (record, _) in zip(jobs, done, strict=True)},
            {},
            out.receipt.index,
            pickled=False,
            kept={} if only_file else hashes_of(out.side_files, out.merged.checkpoint.folder),
        )
        with receipt_place(plan.receipt, staging, overwrite=out.overwrite) as place:
            write_receipt(place, receipt)
            facts = {**_facts(plan), "receipt": receipt_facts(receipt, place, plan.receipt)}
        rows = [row for _, row in done if row is not None]
        staging.publish(overwrite=out.overwrite, only_file=only_file)
        return SwapReport(MergeReport.of(merging.facts(), rows), facts)


def _facts(plan: SwapPlan) -> dict[str, Any]:
    return {
        "merged": plan.unmerge.merged.checkpoint.path.resolve().name,
        "removed": [
            {"name": path.resolve().name, "weight": weight}
            for path, weight, _ in plan.unmerge.adapters
        ],
        "added": [
            {"name": one.path.resolve().name, "weight": one.weight} for one in plan.merging.adapters
        ],
        "restored": len(plan.unmerge.updates),
        "tensors_total": len(plan.unmerge.merged.checkpoint),
        "device": str(plan.merging.device),
        "notes": plan.notes,
    }


def _record_of(merging: Merging) -> list[AdapterRecord]:
    return [
        AdapterRecord(one.path.resolve().name, one.adapter.format, one.weight.hex())
        for one in merging.adapters
    ]


def _check_same_layout(plan: UnmergePlan) -> None:
    """The base must be laid out as the merged checkpoint is, to the byte of the headers."""
    assert plan.receipt is not None
    checkpoint = plan.merged.checkpoint
    ours = {
        str(file.path.relative_to(checkpoint.folder)): file.raw_header for file in checkpoint.files
    }
    theirs = {file.name: file.header for file in plan.receipt.files}
    alike = ours == theirs
    if checkpoint.is_single_file:  # its name is the user's choice
        alike = list(ours.values()) == list(theirs.values())
    if not alike or plan.receipt.side_files:
        raise UsageError(
            f"{checkpoint.path}: the merge changed dtypes, shards, tensors or config",
            hint="use unmerge, then merge",
        )


def _check_base_copies(merging: Merging, restores: Sequence[RestoreJob]) -> None:
    """Base weights that the new adapter carries along must be the restored base's."""
    jobs = {job.name: job for job in restores}
    for name, copies in merging.placement.base_copies.items():
        base = _base_of(jobs[name])
        for copy in copies:
            if not equal_values(base, copy):
                raise DisagreementError(
                    f"{name}: the base weights inside the adapter differ from this base's",
                    hint="use the base that the adapter was trained on",
                )


def _base_of(job: RestoreJob) -> LazyTensor:
    if job.guess is None:
        assert job.merged is not None
        return job.merged
    assert job.record is not None
    return RestoredTensor(job.guess, job.record)


# One tensor -----------------------------------------------------------------------------------


def _swap_tensor(job: _SwapJob) -> tuple[TensorRecord, MergeRow | None]:
    restore = job.restore
    assert restore.record is not None
    if not job.updates:
        restore_tensor(restore)
        same = restore.record.base_sha256
        return TensorRecord("same", same, same), None
    base = _base_of(restore)
    if restore.guess is None:
        check_merged(restore.name, value_sha256(base), restore.record)
    return _merged(job, base)


def _merged(job: _SwapJob, base: LazyTensor) -> tuple[TensorRecord, MergeRow]:
    restore, slot = job.restore, job.restore.slot
    record = restore.record
    assert record is not None
    target = restore.target
    rounder = rounder_of(job.updates, base, 0, target.rows, device=job.device, scaled=job.scaled)
    guess = guess_for_record(base, target, job.updates, job.device, job.parked, job.scaled)
    recorder = Recorder(target.name, guess, job.parked)
    row = MergeRow(target.name, describe(job.updates), 0, 0, 0, 0)
    seen, made = hashlib.sha256(), hashlib.sha256()
    for start, stop in blocks_of(target.shape):
        before = _rows_before(base, start, stop, seen)
        made.update(bit_patterns(before).data)
        block = merge_block(rounder, before, start, target.dtype, target.name, 0, job.device)
        slot.write_rows(start, block.values)
        recorder.add(before, block.values, start, stop)
        row = row.plus(before.numel(), block.changed, block.level2, block.level3)
    if isinstance(base, RestoredTensor) and record.merged_sha256:
        check_merged(target.name, seen.hexdigest(), record)
    check_restored(target.name, made.hexdigest(), record)
    return recorder.record(), row


def _rows_before(base: LazyTensor, start: int, stop: int, seen: Any) -> Tensor:
    """Rows of the base; the merged rows that they come from are added to the hash ``seen``."""
    if not isinstance(base, RestoredTensor):
        return base.read_rows(start, stop)
    after = base.merged_rows(start, stop)
    if after is not None:
        seen.update(bit_patterns(after).data)
    return base.restore(after, start, stop)
