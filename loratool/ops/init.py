"""An adapter to train from, and the residual base where the method needs one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind
from loratool.algebra.blocks import sum_of_squares
from loratool.algebra.factorize import residual_norm
from loratool.algebra.lowrank import LowRank
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NonFiniteValues, NothingMatches, UnsupportedInput, UsageError
from loratool.formats import peft
from loratool.inits.method import Init, Start
from loratool.inits.registry import find_init
from loratool.layouts.config import is_hub_id
from loratool.layouts.pairs import Alignment, Pair, align
from loratool.layouts.patterns import select
from loratool.layouts.targets import targeted
from loratool.ops.adapter_folder import park_factors, stored_value, write_adapter
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_adapter import base_modules
from loratool.ops.merge import plan_merge, run_merge
from loratool.ops.sources import Model, open_model
from loratool.provenance import document, fingerprint
from loratool.storage.dtypes import F32, DType, dtype_named
from loratool.storage.outputs import check_free_space, check_output, staged

SCHEMA_VERSION = 1
_WITH_SHAPE = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.CONV, ModuleKind.EMBEDDING)
_WITH_WEIGHT = (ModuleKind.LINEAR, ModuleKind.CONV1D)


@dataclass(frozen=True)
class InitJob:
    """One module's factors to make."""

    index: int
    pair: Pair
    method: str
    start: Start
    dtype: DType
    device: torch.device
    scratch: Path | None = None

    @property
    def init(self) -> Init:
        return find_init(self.method)

    @property
    def cost(self) -> int:
        """Bytes to read, or to make."""
        if self.init.changes_base:
            return self.pair.base.nbytes
        return self.start.rank * sum(self.start.shape) * 4


@dataclass(frozen=True)
class InitRow:
    """One adapted module. energy_kept: share of ‖W‖² in its s·B·A, None where B is zero."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    energy_kept: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class InitPlan:
    """Everything decided before a weight is read."""

    base: Model
    base_path: Path
    output: Path
    residual: Path | None
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
        return sum(job.start.rank * sum(job.start.shape) * item for job in self.jobs)

    @property
    def notes(self) -> tuple[str, ...]:
        clamped = sum(1 for job in self.jobs if job.start.rank < self.rank)
        limited = f"the rank of {clamped} modules is limited by their smaller side"
        return (*self.alignment.notes, *([limited] if clamped else []))

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "rank": self.rank,
            "alpha": self.alpha,
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
        return sum(row.rank * sum(matrix_shape(row.shape)) for row in self.rows)

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
    overwrite: bool = False,
) -> InitPlan:
    """Read headers and decide which modules get factors. Nothing is written.

    alpha: default, the rank, so that the scale is 1. residual: where the base without s·B·A goes,
    for methods that start from its weights. dtype: of the factors, float32 unless asked
    otherwise. Raises InputError, DisagreementError, UsageError or OutputError.
    """
    init = find_init(method)
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
    pairs = {pair.name: pair for pair in alignment.pairs}
    names = targeted(targets, {name: pair.kind for name, pair in pairs.items()})
    names &= select(list(pairs), include, exclude)
    chosen = [pair for name, pair in pairs.items() if name in names and len(pair.base.shape) > 1]
    _check_modules(chosen, init, alignment)
    scratch_dtype = F32 if dtype is None else dtype_named(dtype)
    target = resolve_device(device)
    jobs = []
    for index, pair in enumerate(chosen):
        shape = _out_in(pair)
        start = Start(shape, min(rank, *shape), alpha / min(rank, *shape), f"{seed}:{pair.name}")
        jobs.append(InitJob(index, pair, method, start, scratch_dtype, target))
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
            peft.NAME,
            base_model=plan.base_model,
            fan_in_fan_out=any(job.pair.kind is ModuleKind.CONV1D for job in jobs),
            task_type=plan.base.config.task_type,
        )
        report = InitReport(tuple(row for row, _ in made), _facts(plan))
        write_adapter(
            staging.out,
            adapter,
            report.to_json(),
            base_modules(plan.alignment),
            config={"inference_mode": False},
        )
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


def start_module(job: InitJob) -> tuple[InitRow, LowRankUpdate]:
    """One module's factors, parked on disk."""
    init, pair = job.init, job.pair
    if init.from_shape is not None:
        value = init.from_shape(_seen_by(job))
        value = value.T if pair.kind is ModuleKind.EMBEDDING else value
        stored, kept = stored_value(pair.name, value, job.dtype), None
    else:
        assert init.from_weight is not None
        weight = _weight(job)
        stored = stored_value(pair.name, init.from_weight(weight, job.start), job.dtype)
        energy = sum_of_squares(weight)
        missed = residual_norm(weight, stored) ** 2
        kept = 1 - missed / energy if energy else None
    rank = stored.rank
    row = InitRow(pair.name, str(pair.kind), tuple(pair.base.shape), rank, kept)
    return row, _park(job, stored)


def _seen_by(job: InitJob) -> Start:
    """An embedding's random factor is the one on the side of the vectors, as PEFT has it."""
    if job.pair.kind is not ModuleKind.EMBEDDING:
        return job.start
    return replace(job.start, shape=job.start.shape[::-1])


def _park(job: InitJob, stored: LowRank) -> LowRankUpdate:
    assert job.scratch is not None
    kind = job.pair.kind
    kernel = job.pair.base.shape[1:] if kind is ModuleKind.CONV else ()
    path = job.scratch / f"{job.index}.raw"
    return park_factors(path, stored, kernel, is_embedding=kind is ModuleKind.EMBEDDING)


def _weight(job: InitJob) -> Tensor:
    weight = job.pair.base.read().to(job.device).float()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteValues(f"{job.pair.name}: holds NaN or infinity")
    return weight.T if job.pair.kind is ModuleKind.CONV1D else weight


def _out_in(pair: Pair) -> tuple[int, int]:
    """(out, in) as the module has it; (dim, vocabulary) of an embedding."""
    rows, columns = pair.base.shape[0], math.prod(pair.base.shape[1:])
    turned = pair.kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING)
    return (columns, rows) if turned else (rows, columns)


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


def _check_modules(chosen: Sequence[Pair], init: Init, alignment: Alignment) -> None:
    """Raises NothingMatches or UnsupportedInput for modules that cannot get factors."""
    if not chosen:
        raise NothingMatches("no matrix is left", hint="loosen --targets, --include, --exclude")
    allowed = _WITH_WEIGHT if init.changes_base else _WITH_SHAPE
    tied = {name for tie in alignment.ties for name in tie.names}
    for pair in chosen:
        experts = alignment.experts
        if experts.is_router(pair.name) or experts.is_retargeted(pair.name):
            raise UnsupportedInput(
                f"{pair.name}: PEFT makes no adapter for it in a mixture of experts",
                hint="leave it out with --exclude",
            )
        if pair.kind not in allowed:
            raise UnsupportedInput(
                f"{pair.name}: is a {pair.kind}; {init.name} starts "
                f"{', '.join(str(kind) for kind in allowed)}",
                hint="leave it out with --exclude",
            )
        if pair.name in tied:
            raise UnsupportedInput(
                f"{pair.name}: is tied; an adapter on one name of it cannot be merged",
                hint="leave it out with --exclude",
            )
        if init.changes_base and pair.base.dtype.name not in ("F32", "F16", "BF16"):
            raise UnsupportedInput(
                f"{pair.name}: is {pair.base.dtype.name}; {init.name} needs 16- or 32-bit floats"
            )


def _facts(plan: InitPlan) -> dict[str, Any]:
    checkpoint = plan.base.checkpoint
    return {
        "method": plan.method,
        "source": find_init(plan.method).source,
        "rank": plan.rank,
        "alpha": plan.alpha,
        "dtype": plan.jobs[0].dtype.name,
        "base_model": plan.base_model,
        "base": {"name": checkpoint.path.resolve().name, "fingerprint": fingerprint(checkpoint)},
        "residual": plan.residual.name if plan.residual else None,
        "notes": list(plan.notes),
    }
