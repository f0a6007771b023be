"""An adapter into a checkpoint: the same files, with only the adapted tensors changed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, LowRankUpdate, Replacement
from loratool.algebra.rounding import MERGEABLE
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import (
    DisagreementError,
    UnsupportedInput,
    UsageError,
)
from loratool.layouts.patterns import select
from loratool.layouts.placing import PlacedUpdate, Placement, describe, place
from loratool.ops.merge_jobs import (
    BLOCK_ELEMENTS,
    COMPILE_ELEMENTS,
    JOB_BYTES,
    WAITING,
    CopyJob,
    MergeJob,
    run_job,
)
from loratool.ops.merge_report import MergeReport
from loratool.ops.sources import Model, open_adapter, open_model
from loratool.storage.checkpoint import (
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    WeightFile,
)
from loratool.storage.outputs import check_free_space, check_output, flushing, staged
from loratool.storage.safetensors_file import encode_header
from loratool.storage.tensors import TensorInfo, equal_values
from loratool.storage.writing import OutputSlot, create_with_header

_LEFT_BEHIND = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "training_args.bin",
)
"""Traces of training, which are no part of a merged model."""


@dataclass(frozen=True)
class MergePlan:
    """Everything decided before a weight is read."""

    base: Model
    adapter: Adapter
    adapter_path: Path
    output: Path
    scale: float
    device: torch.device
    overwrite: bool
    placement: Placement
    left_out: tuple[str, ...]
    side_files: tuple[Path, ...]
    skipped_files: tuple[str, ...]

    @property
    def writes_single_file(self) -> bool:
        """Whether the output is one file because the base was named as one."""
        return self.base.checkpoint.is_single_file and self.output.suffix == ".safetensors"

    @property
    def output_bytes(self) -> int:
        return self.base.checkpoint.size_bytes + sum(p.stat().st_size for p in self.side_files)

    @property
    def changed_bytes(self) -> int:
        tensors = self.base.checkpoint.tensors
        return sum(tensors[name].nbytes for name in self.placement.updates)

    def peak_bytes(self, workers: int) -> int:
        """Working memory: blocks in float32 beside the factors, per worker."""
        factors = [
            sum(4 * math.prod(t.shape) for t in (update.update.b, update.update.a))
            for placed in self.placement.updates.values()
            for update in placed
            if isinstance(update.update, LowRankUpdate)
        ]
        return (workers + WAITING) * (16 * BLOCK_ELEMENTS + 3 * max(factors, default=0))

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            "output_bytes": self.output_bytes,
            "changed_bytes": self.changed_bytes,
            "peak_bytes": self.peak_bytes(workers),
            "device": str(self.device),
            "scale": self.scale,
            "files": [_output_name(file, self) for file in self.base.checkpoint.files],
            "side_files": [path.name for path in self.side_files],
            "skipped_files": list(self.skipped_files),
            "tensors": [
                {"name": name, "update": describe(placed)}
                for name, placed in self.placement.updates.items()
            ],
            "left_out": list(self.left_out),
            "notes": list(self.placement.notes),
        }


def plan_merge(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
) -> MergePlan:
    """Read headers and place every update of the adapter. Nothing is written.

    ``scale`` multiplies the adapter's own scaling. Raises InputError, DisagreementError (an
    update that matches nothing, shapes that differ), UsageError or OutputError.
    """
    target = resolve_device(device)
    model, value = open_model(base), open_adapter(adapter, alpha)
    check_output(output, overwrite=overwrite, inputs=[*model.paths, adapter])
    chosen = select(list(value.updates), include, exclude)
    left_out = tuple(name for name in value.updates if name not in chosen)
    value = replace(value, updates={n: u for n, u in value.updates.items() if n in chosen})
    if scale != 1.0 and value.replacements:
        raise UsageError(
            f"--scale {scale:g} does not apply to parameters that the adapter replaces",
            details=list(value.replacements)[:12],
            hint="leave them out with --exclude, or merge at scale 1",
        )
    placement = place([(value, scale)], model.checkpoint.tensors, model.config)
    _check_dtypes(placement, model)
    side_files, skipped = _side_files(model)
    plan = MergePlan(
        model,
        value,
        adapter,
        output,
        scale,
        target,
        overwrite,
        placement,
        left_out,
        side_files,
        skipped,
    )
    check_free_space(output, plan.output_bytes)
    return plan


def run_merge(
    plan: MergePlan, engine: Engine | None = None, progress: Progress | None = None
) -> MergeReport:
    """Do the work of a plan and publish the merged checkpoint.

    Raises NonFiniteValues and RangeOverflow naming the tensor, DisagreementError when the
    adapter carries a base embedding that is not the base's.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    _check_base_copies(plan)
    with staged(plan.output) as staging:
        jobs: list[MergeJob | CopyJob] = []
        targets = [staging.out / _output_name(f, plan) for f in plan.base.checkpoint.files]
        for file, target in zip(plan.base.checkpoint.files, targets, strict=True):
            jobs += _file_jobs(file, target, plan)
        with flushing(targets):
            parts = engine.map(
                run_job,
                jobs,
                cost=lambda job: job.cost,
                progress=progress,
                what="merging",
                waiting=WAITING,
            )
        only_file = None
        if plan.writes_single_file:
            only_file = _output_name(plan.base.checkpoint.files[0], plan)
        else:
            _write_index(plan, staging.out)
            for source in plan.side_files:
                target = staging.out / source.relative_to(plan.base.checkpoint.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        report = MergeReport.of(plan_facts(plan), [part for part in parts if part is not None])
        staging.publish(overwrite=plan.overwrite, only_file=only_file)
        return report


def plan_facts(plan: MergePlan) -> dict[str, Any]:
    """What the report repeats of the plan."""
    return {
        "base": plan.base.checkpoint.path.resolve().name,
        "adapter": plan.adapter_path.resolve().name,
        "adapter_format": plan.adapter.format,
        "scale": plan.scale,
        "device": str(plan.device),
        "tensors_total": len(plan.base.checkpoint),
        "left_out": list(plan.left_out),
        "skipped_files": list(plan.skipped_files),
        "notes": list(plan.placement.notes),
    }


def _file_jobs(file: WeightFile, target: Path, plan: MergePlan) -> Iterator[MergeJob | CopyJob]:
    """Create the output file with its final header and list the work that fills it."""
    slots = _create_like(file, target)
    updates = plan.placement.updates
    pending: CopyJob | None = None
    for name in sorted(slots, key=lambda name: slots[name].offset):
        info, slot = file.tensors[name], slots[name]
        if name in updates:
            yield from _row_jobs(info, updates[name], slot, plan)
        elif info.nbytes:
            if pending and _continues(pending, info, slot):
                pending = replace(pending, nbytes=pending.nbytes + info.nbytes)
                continue
            if pending:
                yield pending
            pending = CopyJob(info, info.nbytes, slot)
    if pending:
        yield pending


def _continues(job: CopyJob, info: TensorInfo, slot: OutputSlot) -> bool:
    return (
        job.source.strides is None
        and info.strides is None
        and info.offset == job.source.offset + job.nbytes
        and slot.offset == job.slot.offset + job.nbytes
        and job.nbytes < JOB_BYTES
    )


def _row_jobs(
    info: TensorInfo, updates: tuple[PlacedUpdate, ...], slot: OutputSlot, plan: MergePlan
) -> Iterator[MergeJob]:
    rows = info.rows
    compiled = plan.changed_bytes >= 2 * COMPILE_ELEMENTS
    step = max(1, JOB_BYTES * rows // max(1, info.nbytes))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield MergeJob(info, updates, start, stop, slot, plan.device, compiled)


def _create_like(file: WeightFile, target: Path) -> dict[str, OutputSlot]:
    if file.raw_header is not None:
        header = file.raw_header
        offsets = {name: info.offset for name, info in file.tensors.items()}
    else:
        header, offsets = encode_header(
            {name: (info.dtype, info.shape) for name, info in file.tensors.items()},
            {"format": "pt"},
        )
    sizes = [info.numel * info.dtype.bits // 8 for info in file.tensors.values()]
    create_with_header(target, header, len(header) + sum(sizes))
    return {
        name: OutputSlot(target, offsets[name], info.dtype, info.shape)
        for name, info in file.tensors.items()
    }


# Planning -------------------------------------------------------------------------------------


def _check_dtypes(placement: Placement, model: Model) -> None:
    for name, placed in placement.updates.items():
        dtype = model.checkpoint.tensors[name].dtype
        calculated = any(not isinstance(update.update, Replacement) for update in placed)
        if calculated and dtype.torch not in MERGEABLE:
            raise UnsupportedInput(
                f"{name}: is stored as {dtype.name}; merging works on F32, F16 and BF16",
                hint="quantised and 64-bit weights must be converted first",
            )


def _check_base_copies(plan: MergePlan) -> None:
    for ours, copies in plan.placement.base_copies.items():
        info = plan.base.checkpoint.tensors[ours]
        for copy in copies:
            if info.shape != copy.shape:
                raise DisagreementError(
                    f"{ours}: the adapter was trained on a base with shape {list(copy.shape)}, "
                    f"this one has {list(info.shape)}",
                    hint="a resized vocabulary? use the base that the adapter was trained on",
                )
            if not equal_values(info, copy):
                raise DisagreementError(
                    f"{ours}: the base weights inside the adapter differ from this base's",
                    hint="use the base that the adapter was trained on",
                )


def _output_name(file: WeightFile, plan: MergePlan) -> str:
    name = str(file.path.relative_to(plan.base.checkpoint.folder))
    if file.is_safetensors:
        return name
    return _safetensors_name(name)


def _safetensors_name(name: str) -> str:
    suffix = next(s for s in PICKLE_SUFFIXES if name.endswith(s))
    return name.removesuffix(suffix).replace("pytorch_model", "model") + ".safetensors"


def _write_index(plan: MergePlan, folder: Path) -> None:
    checkpoint = plan.base.checkpoint
    if checkpoint.index_path is None or checkpoint.index is None:
        return
    if all(file.is_safetensors for file in checkpoint.files):
        shutil.copyfile(checkpoint.index_path, folder / checkpoint.index_path.name)
        return
    index = dict(checkpoint.index)
    index["weight_map"] = {
        name: _safetensors_name(shard) for name, shard in checkpoint.index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _side_files(model: Model) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files that come along (config, tokenizer, code), and weight files that do not."""
    checkpoint = model.checkpoint
    if checkpoint.is_single_file:
        config = checkpoint.folder / "config.json"
        return ((config,) if config.is_file() else ()), ()
    ours = {file.path for file in checkpoint.files} | {checkpoint.index_path}
    carried, skipped = [], []
    for root, folders, names in os.walk(checkpoint.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if path in ours or name.startswith(".") or name in _LEFT_BEHIND:
                continue
            if path.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json"):
                skipped.append(str(path.relative_to(checkpoint.folder)))
            elif path.is_file():
                carried.append(path)
    return tuple(carried), tuple(skipped)
