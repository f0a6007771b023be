"""An adapter to train from, and the residual base where the method needs one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratool.adapter import Adapter, ModuleKind
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import UsageError
from loratool.formats import loralib, peft
from loratool.formats.written import find_format
from loratool.inits.method import Init, Start
from loratool.inits.registry import find_init
from loratool.layouts.config import is_hub_id
from loratool.layouts.pairs import Alignment, align
from loratool.layouts.qkv_parts import PARTS
from loratool.ops.adapter_folder import write_adapter, write_encoded
from loratool.ops.base_check import samples_of
from loratool.ops.extract_adapter import base_modules
from loratool.ops.init_jobs import InitJob, InitRow, start_module
from loratool.ops.init_modules import choose_modules
from loratool.ops.merge import plan_merge, run_merge
from loratool.ops.sources import Model, open_model
from loratool.plural import counted
from loratool.provenance import document, fingerprint
from loratool.storage.dtypes import F32, dtype_named
from loratool.storage.outputs import check_free_space, check_output, staged

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class InitPlan:
    """Everything decided before a weight is read."""

    base: Model
    base_path: Path
    output: Path
    residual: Path | None
    format: str
    method: str
    rank: int
    alpha: float
    base_model: str | None
    overwrite: bool
    alignment: Alignment
    jobs: tuple[InitJob, ...]

    @property
    def adapter_bytes(self) -> int:
        """Size of the factors."""
        item = self.jobs[0].dtype.bits // 8
        return sum(job.parameters for job in self.jobs) * item

    @property
    def fused_parts(self) -> tuple[str, ...]:
        """Which of q, k and v of the fused matrices are adapted; () where whole matrices are."""
        masks = {job.parts for job in self.jobs if job.parts}
        return tuple(PARTS[i] for mask in masks for i, adapted in enumerate(mask) if adapted)

    @property
    def notes(self) -> tuple[str, ...]:
        clamped = sum(1 for job in self.jobs if job.start.rank < self.rank)
        limited = f"limited by its smaller side: the rank of {counted(clamped, 'module')}"
        return (*self.alignment.notes, *([limited] if clamped else []))

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "method": self.method,
            "rank": self.rank,
            "alpha": self.alpha,
            "fused_parts": list(self.fused_parts),
            "parameters": sum(job.parameters for job in self.jobs),
            "adapter_bytes": self.adapter_bytes,
            "residual_bytes": self.base.checkpoint.size_bytes if self.residual else 0,
            "modules": [
                {"name": job.pair.name, "shape": list(job.pair.base.shape), "rank": job.start.rank}
                for job in self.jobs
            ],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class InitReport:
    """What was made."""

    rows: tuple[InitRow, ...]
    facts: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(row.parameters for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        totals = {"modules": len(self.rows), "parameters": self.parameters}
        rows = [row.to_json() for row in self.rows]
        return document("init", SCHEMA_VERSION, {**self.facts, "totals": totals, "modules": rows})


def plan_init(
    base: Path,
    output: Path,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str = "all-linear",
    method: str = "kaiming",
    residual: Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    base_model: str | None = None,
    format: str = "peft",
    overwrite: bool = False,
) -> InitPlan:
    """Read headers and decide which modules get factors. Nothing is written.

    alpha: default, the rank, so that the scale is 1. residual: where the base without s·B·A goes,
    for methods that start from its weights. dtype: of the factors, float32 unless asked
    otherwise. format: one of ``formats.written.FORMATS``; loralib can hold q, k and v of a fused
    matrix apart, PEFT cannot. Raises InputError, DisagreementError, UsageError or OutputError.
    """
    init = find_init(method)
    find_format(format)
    if rank < 1:
        raise UsageError(f"rank {rank} is not positive")
    alpha = float(rank if alpha is None else alpha)
    if not alpha > 0:
        raise UsageError(f"alpha {alpha:g} is not positive")
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not of the form owner/name")
    _check_residual(init, residual, output)
    model = open_model(base)
    for path in (output, residual):
        if path is not None:
            check_output(path, overwrite=overwrite, inputs=model.paths)
    tensors = model.checkpoint.tensors
    alignment = align(tensors, tensors, model.config, model.config)
    chosen = choose_modules(alignment, model.config, init, targets, include, exclude, format)
    scratch_dtype = F32 if dtype is None else dtype_named(dtype)
    target = resolve_device(device)
    jobs = []
    for index, each in enumerate(chosen):
        most = min(rank, *each.shape)
        start = Start(each.shape, most, alpha / most, f"{seed}:{each.pair.name}")
        jobs.append(InitJob(index, each.pair, each.parts, method, start, scratch_dtype, target))
    if all(job.start.rank < rank for job in jobs):
        most = max(job.start.rank for job in jobs)
        raise UsageError(
            f"rank {rank} is above the smaller side of every chosen matrix (at most {most})"
        )
    plan = InitPlan(
        model,
        base,
        output,
        residual,
        format,
        method,
        rank,
        alpha,
        base_model or model.config.hub_name,
        overwrite,
        alignment,
        tuple(jobs),
    )
    check_free_space(output, 2 * plan.adapter_bytes)
    if residual is not None:
        check_free_space(residual, model.checkpoint.size_bytes)
    return plan


def run_init(
    plan: InitPlan, engine: Engine | None = None, progress: Progress | None = None
) -> InitReport:
    """Make the factors, write the residual base if there is to be one, then the adapter.

    Raises NonFiniteValues and RangeOverflow naming the tensor.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    with staged(plan.output) as staging:
        jobs = [replace(job, scratch=staging.scratch) for job in plan.jobs]
        made = engine.map(
            start_module, jobs, cost=lambda job: job.cost, progress=progress, what="initialising"
        )
        adapter = Adapter(
            {row.name: update for row, update in made},
            loralib.NAME if plan.format == "loralib" else peft.NAME,
            base_model=plan.base_model if plan.residual is None else None,
            fan_in_fan_out=any(job.pair.kind is ModuleKind.CONV1D for job in jobs),
            task_type=plan.base.config.task_type,
        )
        report = InitReport(tuple(row for row, _ in made), _facts(plan))
        _write(plan, staging.out, adapter, report)
        if plan.residual is not None:
            without = plan_merge(
                plan.base_path,
                [(staging.out, -1.0)],
                plan.residual,
                device=str(jobs[0].device),
                overwrite=plan.overwrite,
            )
            run_merge(without, engine, progress)
        staging.publish(overwrite=plan.overwrite)
    return report


def _write(plan: InitPlan, folder: Path, adapter: Adapter, report: InitReport) -> None:
    if plan.format == "loralib":
        write_encoded(folder, find_format(plan.format).encode(adapter), report.to_json())
        return
    config = {"inference_mode": False}
    write_adapter(folder, adapter, report.to_json(), base_modules(plan.alignment), config)


def _check_residual(init: Init, residual: Path | None, output: Path) -> None:
    if init.changes_base and residual is None:
        raise UsageError(
            f"{init.name} takes its start out of the base's weights, so training needs the base "
            "without it",
            hint="--residual DIR says where that residual base goes",
        )
    if not init.changes_base and residual is not None:
        raise UsageError(
            f"{init.name} leaves the base as it is", hint="leave --residual out, train on the base"
        )
    if residual is not None and residual.resolve() == output.resolve():
        raise UsageError(f"{residual}: is the adapter's own place", hint="choose another")


def _facts(plan: InitPlan) -> dict[str, Any]:
    checkpoint = plan.base.checkpoint
    base: dict[str, Any] = {
        "name": checkpoint.path.resolve().name,
        "fingerprint": fingerprint(checkpoint),
    }
    if plan.residual is None:
        base["samples"] = samples_of(job.pair.base for job in plan.jobs)
    return {
        "format": plan.format,
        "fused_parts": list(plan.fused_parts),
        "method": plan.method,
        "source": find_init(plan.method).source,
        "rank": plan.rank,
        "alpha": plan.alpha,
        "dtype": plan.jobs[0].dtype.name,
        "base_model": plan.base_model,
        "base": base,
        "residual": plan.residual.name if plan.residual else None,
        "notes": list(plan.notes),
    }
