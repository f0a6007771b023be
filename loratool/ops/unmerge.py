"""An adapter out of a checkpoint again: the base bit for bit, or the nearest to it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import DisagreementError, UsageError
from loratool.layouts.placed import TieChoice
from loratool.layouts.placing import PlacedUpdate, place
from loratool.layouts.scales import ScaledBy
from loratool.ops.eight_bits import scales_of
from loratool.ops.merge_inputs import chosen_of
from loratool.ops.merge_sides import side_files_of
from loratool.ops.receipt_match import given_as_recorded
from loratool.ops.restoring import (
    Guess,
    RestoredTensor,
    byte_parts,
    leading,
    uncertain,
)
from loratool.ops.sources import Model, open_adapters, open_model
from loratool.ops.unmerge_checks import (
    check_can_be_taken_off,
    check_dtypes,
    check_layout,
    files_as_merged,
    find_receipt,
    notes_on_files,
)
from loratool.ops.unmerge_report import UnmergeReport, UnmergeRow
from loratool.receipt import (
    FileRecord,
    Receipt,
    TensorRecord,
    bit_patterns,
    blocks_of,
    read_receipt,
)
from loratool.storage.outputs import check_free_space, check_output, staged
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Stored
from loratool.storage.writing import OutputSlot, create_with_header, write_at


@dataclass(frozen=True)
class RestoreJob:
    """One tensor to restore. merged: None where the merged checkpoint has none of that shape.
    record: None without a receipt. guess: None for a tensor that is only copied."""

    name: str
    merged: Stored | None
    target: TensorInfo
    record: TensorRecord | None
    guess: Guess | None

    @property
    def cost(self) -> int:
        return self.target.nbytes

    @property
    def slot(self) -> OutputSlot:
        """Where its values go."""
        return OutputSlot(
            self.target.path, self.target.offset, self.target.dtype, self.target.shape
        )


@dataclass(frozen=True)
class UnmergePlan:
    """Everything decided before a weight is read. updates: by merged tensor, what to take off.
    scaled: of the tensors in 8 bits."""

    merged: Model
    adapters: tuple[tuple[Path, float, Adapter], ...]
    output: Path
    receipt_path: Path | None
    receipt: Receipt | None
    updates: Mapping[str, tuple[PlacedUpdate, ...]]
    scaled: Mapping[str, ScaledBy]
    files: tuple[FileRecord, ...]
    side_files: tuple[Path, ...]
    device: torch.device
    overwrite: bool
    notes: tuple[str, ...]

    @property
    def writes_single_file(self) -> bool:
        """Whether the output is one file because the merged checkpoint was named as one."""
        return self.merged.checkpoint.is_single_file and self.output.suffix == ".safetensors"

    @property
    def output_bytes(self) -> int:
        return sum(file.size for file in self.files) + sum(
            path.stat().st_size for path in self.side_files
        )

    def jobs(self, folder: Path) -> list[RestoreJob]:
        """One per tensor of the base, whose files lie in ``folder``."""
        layout = Receipt((), self.files, {}, {}, "", False).base_tensors(folder)
        return [self._job(name, info) for name, info in layout.items()]

    def _job(self, name: str, target: TensorInfo) -> RestoreJob:
        record = self.receipt.tensors[name] if self.receipt else None
        merged = leading(self.merged.checkpoint.tensors.get(name), target.shape)
        updates = self.updates.get(name, ())
        without = "subtract" if updates else "same"
        method = record.method if record else without
        if method == "same":
            return RestoreJob(name, merged, target, record, None)
        norms = record.norms if record else None
        guess = Guess(
            method,
            target.dtype,
            target.shape,
            merged,
            updates,
            self.device,
            norms,
            self.scaled.get(name),
        )
        return RestoreJob(name, merged, target, record, guess)

    def to_json(self) -> dict[str, Any]:
        return {
            "output_bytes": self.output_bytes,
            "receipt": self.receipt_path.name if self.receipt_path else None,
            "exact": self.receipt is not None,
            "device": str(self.device),
            "files": [file.name for file in self.files],
            "tensors": sorted(self.updates),
            "notes": list(self.notes),
        }


def plan_unmerge(
    merged: Path,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    *,
    receipt: Path | None = None,
    without_receipt: bool = False,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
) -> UnmergePlan:
    """Read headers, the receipt and the adapters, and check that they belong together.

    adapters: each with the weight that it was merged with. receipt: where it is; by default the
    one in the merged folder, if it is there. include, exclude: which of the adapters' updates were
    merged, where no receipt tells. Raises InputError, DisagreementError naming what
    differs from the receipt, UsageError, OutputError.
    """
    model = open_model(merged)
    found = find_receipt(model, receipt) if not without_receipt else None
    known = read_receipt(found) if found else None
    values, left_out = chosen_of(
        open_adapters([path for path, _ in adapters], alpha), include, exclude
    )
    opened = tuple((*one, value) for one, value in zip(adapters, values, strict=True))
    if not opened:
        raise UsageError("no adapter is named")
    inputs = [*model.paths, *(path for path, _ in adapters), *([found] if found else [])]
    check_output(output, overwrite=overwrite, inputs=inputs)
    placement = place(
        [(adapter, weight) for _, weight, adapter in opened],
        model.checkpoint.tensors,
        model.config,
        ties=TieChoice.BOTH,  # or the config would not say that they are tied
    )
    if known is None:
        updates: Mapping[str, tuple[PlacedUpdate, ...]] = placement.updates
        check_can_be_taken_off(updates)
        files = files_as_merged(model)
    else:
        assert found is not None
        updates = given_as_recorded(known, found, opened, placement.updates, left_out)
        check_layout(known, found, model)
        files = known.files
    scaled = scales_of(updates, model, lossy=True)
    check_dtypes(updates, scaled, model, known)
    side_files = side_files_of(model)
    plan = UnmergePlan(
        model,
        opened,
        output,
        found,
        known,
        updates,
        scaled,
        files,
        tuple(side_files),
        resolve_device(device),
        overwrite,
        (*placement.notes, *notes_on_files(known, side_files, model)),
    )
    if plan.writes_single_file and len(files) > 1:
        raise UsageError(f"{output}: is one file, the base had {len(files)}")
    check_free_space(output, plan.output_bytes)
    return plan


def run_unmerge(
    plan: UnmergePlan, engine: Engine | None = None, progress: Progress | None = None
) -> UnmergeReport:
    """Restore every tensor, check it against the receipt, and publish.

    Raises DisagreementError when merged values are not those that the receipt was made for,
    MalformedFile when the receipt does not lead to the base that it describes.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    with staged(plan.output) as staging:
        for file in plan.files:
            create_with_header(staging.out / file.name, file.header, file.size)
        rows = engine.map(
            restore_tensor,
            plan.jobs(staging.out),
            cost=lambda job: job.cost,
            progress=progress,
            what="unmerging",
        )
        only_file = plan.files[0].name if plan.writes_single_file else None
        if only_file is None:
            write_beside(staging.out, plan.merged, plan.receipt, plan.side_files)
        report = UnmergeReport(tuple(row for row in rows if row is not None), _facts(plan))
        staging.publish(overwrite=plan.overwrite, only_file=only_file)
        return report


def _facts(plan: UnmergePlan) -> dict[str, Any]:
    return {
        "merged": plan.merged.checkpoint.path.resolve().name,
        "adapters": [
            {"name": path.resolve().name, "format": adapter.format, "weight": weight}
            for path, weight, adapter in plan.adapters
        ],
        "receipt": plan.receipt_path.name if plan.receipt_path else None,
        "exact": plan.receipt is not None,
        "device": str(plan.device),
        "tensors_total": len(plan.receipt.tensors if plan.receipt else plan.merged.checkpoint),
        "notes": list(plan.notes),
    }


def restore_tensor(job: RestoreJob) -> UnmergeRow | None:
    """Write one tensor of the base; what it took, or None where it was only copied."""
    if job.guess is None:
        _copy(job)
        return None
    if job.record is None:
        return _restore_nearest(job)
    return _restore_exactly(job)


def _copy(job: RestoreJob) -> None:
    assert job.merged is not None
    digest = hashlib.sha256()
    position = job.target.offset
    for part in byte_parts(job.merged):
        if job.record is not None:
            digest.update(part)
        write_at(job.target.path, position, part)
        position += len(part)
    if job.record is not None:
        check_merged(job.name, digest.hexdigest(), job.record)


def _restore_exactly(job: RestoreJob) -> UnmergeRow:
    assert job.record is not None
    assert job.guess is not None
    restored = RestoredTensor(job.guess, job.record)
    seen, made = hashlib.sha256(), hashlib.sha256()
    for start, stop in blocks_of(job.target.shape):
        after = restored.merged_rows(start, stop)
        if after is not None:
            seen.update(bit_patterns(after).data)
        rows = restored.restore(after, start, stop)
        made.update(bit_patterns(rows).data)
        job.slot.write_rows(start, rows)
    if job.merged is not None and job.record.merged_sha256:
        check_merged(job.name, seen.hexdigest(), job.record)
    check_restored(job.name, made.hexdigest(), job.record)
    return UnmergeRow(job.name, job.target.numel, job.record.misses, 0)


def check_merged(name: str, sha256: str, record: TensorRecord) -> None:
    """Raises DisagreementError when the merged values are not those the receipt was made for."""
    if sha256 != record.merged_sha256:
        raise DisagreementError(
            f"{name}: its values are not those that the receipt was made for",
            hint="the merged checkpoint was changed since, or the receipt belongs to another merge",
        )


def check_restored(name: str, sha256: str, record: TensorRecord) -> None:
    """Raises DisagreementError when what was restored is not the base."""
    if sha256 != record.base_sha256:
        raise DisagreementError(
            f"{name}: what the receipt leads to is not the base that it describes",
            hint="the receipt was changed; only the one that the merge wrote restores the base",
        )


def _restore_nearest(job: RestoreJob) -> UnmergeRow:
    guess = job.guess
    assert guess is not None
    assert job.merged is not None
    lower = guess.rounder()
    raised = guess.adder()
    doubtful = 0
    for start, stop in blocks_of(job.target.shape):
        after = job.merged.read_rows(start, stop)
        rows = guess.of_rows(lower, after, start, stop)
        doubtful += uncertain(rows, after, raised, start, guess.device)
        job.slot.write_rows(start, rows)
    return UnmergeRow(job.name, job.target.numel, 0, doubtful)


def write_beside(
    folder: Path, merged: Model, receipt: Receipt | None, side_files: Sequence[Path]
) -> None:
    """The small files and the index, as the base had them where a receipt says how."""
    for source in side_files:
        target = folder / source.relative_to(merged.checkpoint.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    index = merged.checkpoint.index_path
    if receipt is None:
        if index is not None:
            shutil.copyfile(index, folder / index.name)
        return
    if receipt.index and receipt.index not in receipt.side_files and index is not None:
        shutil.copyfile(index, folder / receipt.index)
    for name, data in receipt.side_files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data.read().numpy().tobytes())
