"""The receipt that a merge leaves, from the base and what it became."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratool.engine import Engine, Progress
from loratool.errors import OutputError
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.ops.merge_inputs import Merging
from loratool.ops.merge_layout import lay_out
from loratool.ops.merge_sides import hashes_of, side_files_of
from loratool.ops.restoring import (
    Recorder,
    beyond,
    guess_for_record,
    value_sha256,
)
from loratool.ops.sources import Model
from loratool.receipt import (
    RECEIPT_FILE,
    AdapterRecord,
    FileRecord,
    Receipt,
    TensorRecord,
    as_bytes_tensor,
    blocks_of,
    write_receipt,
)
from loratool.storage.checkpoint import Checkpoint, open_checkpoint
from loratool.storage.outputs import Staging, check_output, staged
from loratool.storage.tensors import LazyTensor, TensorInfo

BITS_PER_WEIGHT = (0.06, 0.7)
"""Measured for changes of 0.3 % and 10 % of the weights' norm (benchmarks/receipt_cost.py)."""


_RECORD_BYTES = 400
"""Of header and hashes, for each tensor."""


@dataclass(frozen=True)
class _RecordJob:
    base: TensorInfo
    merged: TensorInfo | None
    updates: tuple[PlacedUpdate, ...]
    device: torch.device
    parked: Path
    scaled: ScaledBy | None

    @property
    def cost(self) -> int:
        return self.base.nbytes


def likely_bytes(weights: int, tensors: int) -> tuple[int, int]:
    """About how large a receipt gets: for changes of 0.3 % and of 10 % of the weights' norm.

    weights: of the changed tensors. tensors: all of the checkpoint's.
    """
    low, high = (_RECORD_BYTES * tensors + int(weights * bits / 8) for bits in BITS_PER_WEIGHT)
    return low, high


def plan_receipt(
    wanted: bool | Path,
    base: Model,
    output: Path,
    *,
    overwrite: bool,
    adapters: Sequence[Path] = (),
) -> Path | None:
    """Where the receipt goes: beside or inside the output, or at the path that was named.

    Raises OutputError, also where that is an input.
    """
    if wanted is False:
        return None
    single = base.checkpoint.is_single_file and output.suffix == ".safetensors"
    usual = output.with_name(f"{output.stem}.{RECEIPT_FILE}") if single else output / RECEIPT_FILE
    path = usual if wanted is True else wanted
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: a receipt is a .safetensors file")
    if path != output / RECEIPT_FILE:
        if path.resolve().is_relative_to(output.resolve()):
            raise OutputError(
                f"{path}: lies inside the output; in there it is named {RECEIPT_FILE}",
                hint="leave out the name, or choose a place elsewhere",
            )
        check_output(path, overwrite=overwrite, inputs=[*base.paths, *adapters])
    return path


@contextmanager
def receipt_left(
    path: Path | None,
    merging: Merging,
    staging: Staging,
    files: Sequence[str],
    index: str | None,
    *,
    overwrite: bool,
    engine: Engine,
    progress: Progress,
) -> Iterator[dict[str, Any] | None]:
    """Write the receipt of a merge whose ``files`` lie finished in the staging folder.

    It is published when the block ends. Gives what the report says of it, None without one.
    """
    (staging.out / RECEIPT_FILE).unlink(missing_ok=True)  # of a run that was taken over
    if path is None:
        yield None
        return
    entry = staging.out / (index or files[0])
    tell = _Telling(merging, open_checkpoint(entry), staging.scratch, engine, progress)
    with receipt_place(path, staging, overwrite=overwrite) as place:
        yield tell.write(place, path)


@contextmanager
def receipt_place(path: Path, staging: Staging, *, overwrite: bool) -> Iterator[Path]:
    """Where to write the receipt that ends up at ``path``: in the output, with which it is then
    published, or in a place of its own, from which it is published when the block ends."""
    if Path(os.path.abspath(path.parent)) == staging.output:
        yield staging.out / RECEIPT_FILE
        return
    with staged(path) as own:
        yield own.out / path.name
        own.publish(overwrite=overwrite, only_file=path.name)


@dataclass(frozen=True)
class _Telling:
    """All that a receipt of this merge is made from."""

    merging: Merging
    merged: Checkpoint
    scratch: Path
    engine: Engine
    progress: Progress

    def write(self, path: Path, final: Path) -> dict[str, Any]:
        """Write it to ``path``, from where it goes to ``final``; say what it took."""
        merging = self.merging
        receipt = leave_receipt(
            path,
            merging.base.checkpoint,
            self.merged,
            merging.placement.updates,
            [
                AdapterRecord(
                    one.path.resolve().name,
                    one.adapter.format,
                    (one.weight * merging.scale).hex(),
                )
                for one in merging.adapters
            ],
            side_files_of(merging.base),
            scaled=merging.scaled,
            device=merging.device,
            scratch=self.scratch,
            engine=self.engine,
            progress=self.progress,
        )
        return receipt_facts(receipt, path, final)


def receipt_facts(receipt: Receipt, path: Path, final: Path) -> dict[str, Any]:
    """What a report says of a receipt."""
    changed = [record for record in receipt.tensors.values() if record.method != "same"]
    shapes = receipt.base_tensors(Path("base"))
    weights = sum(
        shapes[name].numel for name, record in receipt.tensors.items() if record.method != "same"
    )
    return {
        "name": final.name,
        "bytes": path.stat().st_size,
        "corrected": sum(record.misses for record in changed),
        "bits_per_weight": 8 * receipt.correction_bytes / max(1, weights),
    }


def leave_receipt(
    path: Path,
    base: Checkpoint,
    merged: Checkpoint,
    updates: Mapping[str, tuple[PlacedUpdate, ...]],
    adapters: Sequence[AdapterRecord],
    side_files: Sequence[Path],
    *,
    scaled: Mapping[str, ScaledBy],
    device: torch.device,
    scratch: Path,
    engine: Engine,
    progress: Progress,
) -> Receipt:
    """Compare every tensor of ``base`` with its merged one and write the receipt to ``path``.

    updates: what was merged into each tensor. side_files: the base's small files. scaled: of the
    tensors in 8 bits. scratch: a folder for what is parked meanwhile.
    """
    jobs = [
        _RecordJob(
            info,
            merged.tensors.get(name),
            updates.get(name, ()),
            device,
            scratch / f"corrections-{index}",
            scaled.get(name),
        )
        for index, (name, info) in enumerate(base.tensors.items())
    ]
    records = engine.map(
        _record, jobs, cost=lambda job: job.cost, progress=progress, what="writing the receipt"
    )
    added = beyond(base.tensors, merged.tensors)
    hashes = engine.map(
        value_sha256,
        list(added.values()),
        cost=lambda info: info.nbytes,
        progress=progress,
        what="hashing what was added",
    )
    files, index = _files_of(base), _index_of(base)
    changed = changed_files(base, merged, side_files, index)
    same = [path for path in side_files if str(path.relative_to(base.folder)) not in changed]
    if base.is_single_file:
        same = [path for path in same if (merged.folder / path.name).is_file()]
    receipt = Receipt(
        tuple(adapters),
        tuple(files),
        {job.base.name: record for job, record in zip(jobs, records, strict=True)},
        changed,
        index[0] if index else "",
        pickled=_is_pickled(base),
        added=dict(zip(added, hashes, strict=True)),
        kept=hashes_of(same, base.folder),
    )
    write_receipt(path, receipt)
    return receipt


def _record(job: _RecordJob) -> TensorRecord:
    base, merged = job.base, job.merged
    if merged is not None and (merged.dtype, merged.shape) == (base.dtype, base.shape):
        ours = value_sha256(base)
        if not job.updates and ours == value_sha256(merged):
            return TensorRecord("same", ours, ours)
    guess = guess_for_record(base, merged, job.updates, job.device, job.parked, job.scaled)
    recorder = Recorder(base.name, guess, job.parked)
    for start, stop in blocks_of(base.shape):
        after = guess.merged.read_rows(start, stop) if guess.merged is not None else None
        recorder.add(base.read_rows(start, stop), after, start, stop)
    return recorder.record()


def _is_pickled(base: Checkpoint) -> bool:
    return not all(file.is_safetensors for file in base.files)


def _files_of(base: Checkpoint) -> list[FileRecord]:
    """The base's files by header. A pickle has none: it is rebuilt as a merge that changes neither
    dtypes nor shards lays it out."""
    if _is_pickled(base):
        return [FileRecord(file.name, file.header, file.size) for file in lay_out(base).files]
    return [
        FileRecord(
            str(file.path.relative_to(base.folder)),
            file.raw_header or b"",
            file.path.stat().st_size,
        )
        for file in base.files
    ]


def _index_of(base: Checkpoint) -> tuple[str, bytes] | None:
    """The name and the content of the index of those files."""
    return lay_out(base).index


def changed_files(
    base: Checkpoint,
    merged: Checkpoint,
    side_files: Sequence[Path],
    index: tuple[str, bytes] | None,
) -> dict[str, LazyTensor]:
    """Small files that the merged folder has not, or has with other bytes, as the base has them;
    the index among them. What lies beside a base that is one file comes along into folders only,
    so it is none of it where it did not."""
    found: dict[str, LazyTensor] = {}
    for path in side_files:
        relative = path.relative_to(base.folder)
        other = merged.folder / relative
        if not other.is_file():
            differs = not base.is_single_file
        else:
            differs = not filecmp.cmp(path, other, shallow=False)
        if differs:
            found[str(relative)] = as_bytes_tensor(path.read_bytes())
    if index is not None:
        index_name, content = index
        other = merged.folder / index_name
        if not other.is_file() or other.read_bytes() != content:
            found[index_name] = as_bytes_tensor(content)
    return found
