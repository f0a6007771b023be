"""An adapter at another rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    LowRankUpdate,
    TokenRows,
    Update,
)
from loratool.algebra.budget import allocate, parse_size
from loratool.algebra.ranks import RankLimits, parse_rank_rule
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import NothingMatches, UsageError
from loratool.formats import peft
from loratool.formats.written import DEFAULT as DEFAULT_FORMAT
from loratool.formats.written import WrittenFormat, find_format
from loratool.ops.adapter_folder import (
    dtype_of_factors,
    write_encoded,
)
from loratool.ops.biases import check_biases, load_bias, store_bias, weight_of
from loratool.ops.combine_report import UpdatesReport
from loratool.ops.extract_adapter import stored_size
from loratool.ops.low_rank_forms import in_low_rank_form, refuse_others
from loratool.ops.resize_jobs import ResizeJob, ResizeResult, resize_update, spectrum_of
from loratool.ops.sources import open_adapter
from loratool.ops.stacks import at_one_rank, completed, is_indexed, nothing_like
from loratool.plural import counted
from loratool.profiles import Profile, check_kinds, find_profile, fit
from loratool.storage.dtypes import DType
from loratool.storage.outputs import check_free_space, check_output, staged

_BUDGET = "budget:"


@dataclass(frozen=True)
class ResizePlan:
    """Everything decided before a tensor is read."""

    path: Path
    adapter: Adapter
    output: Path
    rank: str
    budget: int | None
    uniform: bool
    balance: bool
    profile: Profile
    format: WrittenFormat
    dtype: DType
    device: torch.device
    seed: int
    overwrite: bool
    jobs: tuple[ResizeJob, ...]
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        return sum(job.cost for job in self.jobs)

    @property
    def adapter_bytes_at_most(self) -> int:
        """Size of the resized updates."""
        if self.budget is not None:
            return self.budget * self.dtype.bits // 8
        top = max(job.rank_at_most for job in self.jobs)
        ranks = [top if self.uniform else job.rank_at_most for job in self.jobs]
        factors = sum(r * sum(job.shape) for r, job in zip(ranks, self.jobs, strict=True))
        return factors * self.dtype.bits // 8

    def facts(self) -> dict[str, Any]:
        """What was asked for, for reports."""
        return {
            "adapter": self.path.resolve().name,
            "adapter_format": self.adapter.format,
            "base_model": self.adapter.base_model,
            "rank": self.rank,
            "uniform": self.uniform,
            "balance": self.balance,
            "profile": self.profile.name,
            "format": self.format.label,
            "dtype": self.dtype.name,
            "device": str(self.device),
            "seed": self.seed,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **self.facts(),
            "read_bytes": self.read_bytes,
            "adapter_bytes_at_most": self.adapter_bytes_at_most,
            "notes": list(self.notes),
            "updates": [
                {
                    "name": job.name,
                    "shape": list(job.shape),
                    "rank": job.update.rank,
                    "rank_at_most": job.rank_at_most,
                }
                for job in self.jobs
            ],
        }


def plan_resize(
    adapter: Path,
    output: Path,
    *,
    rank: str | int,
    limits: RankLimits | None = None,
    uniform: bool = False,
    balance: bool = False,
    profile: str = "peft",
    format: str = DEFAULT_FORMAT,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    alpha: float | None = None,
    overwrite: bool = False,
) -> ResizePlan:
    """Read headers and decide about every update. Nothing is written.

    rank: a number, a rule, or ``budget:SIZE`` for all updates together. uniform: one rank and one
    scale for all. format: of the result. balance: new factors B·√Σ and √Σ·A even where no
    rank changes. Raises InputError, DisagreementError, Unplaced, UsageError or OutputError.
    """
    limits = limits or RankLimits()
    is_budget = str(rank).startswith(_BUDGET)
    consumer = find_profile(profile)
    written = find_format(format)
    if written.name != DEFAULT_FORMAT and consumer.name != DEFAULT_FORMAT:
        raise UsageError(f"a profile is of PEFT's files, not of {written.name}'s")
    uniform = uniform or consumer.limits.one_rank or written.one_alpha
    if is_budget and (uniform or limits != RankLimits()):
        raise UsageError(
            "a budget goes with no limits on ranks, no --uniform, and no profile or format of one "
            "rank"
        )
    rule = parse_rank_rule("full" if is_budget else str(rank), limits)
    target = resolve_device(device)
    opened, notes = in_low_rank_form(open_adapter(adapter, alpha))
    check_output(output, overwrite=overwrite, inputs=[adapter])
    refuse_others(str(adapter), opened, (TokenRows, DoraUpdate, DenseUpdate))
    factors = opened.factors
    biases = {n: u for n, u in opened.others.items() if isinstance(u, DenseUpdate)}
    check_biases(str(adapter), biases, factors)
    if not factors:
        raise NothingMatches(f"{adapter}: holds no low-rank update to resize")
    if len(factors) > len(opened.low_rank):
        notes.append(
            f"{len(factors) - len(opened.low_rank)} updates are DoRA's: their magnitudes stay, and "
            "the stated errors are those of s·B·A, since what the whole changes depends on the base"
        )
    if is_budget and any(is_indexed(name) for name in factors):
        raise UsageError(f"{adapter}: experts take one rank together; a budget is not for them")
    stored = dtype_of_factors(dtype, (f for u in factors.values() for f in (u.b, u.a)))
    scales = {update.scale for update in factors.values()}
    one_scale = scales.pop() if len(scales) == 1 else 1.0
    jobs = tuple(
        ResizeJob(
            index,
            name,
            str(adapter),
            update,
            rule,
            (one_scale if uniform else update.scale) or 1.0,
            balance,
            stored,
            target,
            seed,
        )
        for index, (name, update) in enumerate(sorted(factors.items()))
    )
    plan = ResizePlan(
        adapter,
        opened,
        output,
        str(rank) if is_budget else str(rule),
        _budget(str(rank), stored, opened) if is_budget else None,
        uniform,
        balance,
        consumer,
        written,
        stored,
        target,
        seed,
        overwrite,
        jobs,
        tuple(notes),
    )
    written.check(opened)
    check_kinds(opened, consumer)
    check_free_space(output, 2 * plan.adapter_bytes_at_most)
    return plan


def _budget(rank: str, dtype: DType, adapter: Adapter) -> int:
    values = sum(u.rank * sum(u.shape) for u in adapter.factors.values())
    parameters = parse_size(rank.removeprefix(_BUDGET), dtype.bits // 8, values)
    if not parameters:
        raise UsageError(
            f"rank {rank!r}: a budget is a number of parameters, a size or a share of the adapter",
            hint="for example budget:500000, budget:20MB, budget:50%",
        )
    return parameters


def run_resize(
    plan: ResizePlan, engine: Engine | None = None, progress: Progress | None = None
) -> UpdatesReport:
    """Do the work of a plan and publish the adapter folder.

    Raises NothingMatches when nothing is left.
    """
    engine, progress = engine or Engine(), progress or NoProgress()
    notes: list[str] = []
    jobs = list(plan.jobs)
    if plan.budget is not None:
        jobs, notes = _spend(plan, plan.budget, engine, progress)
    with staged(plan.output) as staging:
        results = engine.map(
            resize_update,
            [replace(job, scratch=staging.scratch) for job in jobs],
            cost=lambda job: job.cost,
            progress=progress,
            what="resizing",
        )
        adapter, more = _adapter(plan, results)
        fitted = fit(adapter, plan.profile, str(plan.seed))
        ranks = {name: update.rank for name, update in fitted.adapter.factors.items()}
        encoded = plan.format.encode(fitted.adapter)
        report = UpdatesReport(
            "resize",
            tuple(replace(r.row, rank=ranks.get(r.row.name, 0)) for r in results),
            plan.facts(),
            (*plan.notes, *notes, *more, *fitted.notes, *encoded.notes),
            *stored_size(fitted.adapter),
        )
        write_encoded(staging.out, encoded, report.to_json())
        staging.publish(overwrite=plan.overwrite)
        return report


def _spend(
    plan: ResizePlan, parameters: int, engine: Engine, progress: Progress
) -> tuple[list[ResizeJob], list[str]]:
    """Jobs with the ranks that the budget gives them; a rank of 0 leaves an update out."""
    spectra = engine.map(
        spectrum_of,
        plan.jobs,
        cost=lambda job: job.cost,
        progress=progress,
        what="reading spectra",
    )
    allocation = allocate(spectra, parameters)
    jobs = [
        replace(job, rule=parse_rank_rule(str(rank)))
        for job, rank in zip(plan.jobs, allocation.ranks, strict=True)
        if rank
    ]
    if not jobs:
        raise NothingMatches(
            f"a budget of {counted(parameters, 'parameter')} holds no component at all"
        )
    notes = [f"{allocation.used:,} of the budget's {parameters:,} parameters are used"]
    left_out = len(plan.jobs) - len(jobs)
    if left_out:
        notes.append(f"the budget leaves nothing for {counted(left_out, 'update')}")
    return jobs, notes


def _adapter(plan: ResizePlan, results: Sequence[ResizeResult]) -> tuple[Adapter, list[str]]:
    low_rank = {r.row.name: r.update for r in results if r.update is not None}
    if not low_rank:
        raise NothingMatches("nothing is left of the adapter", hint="choose another --rank")
    key = str(plan.seed)
    notes = []
    names = {job.name for job in plan.jobs}
    needed = {n for n, u in plan.adapter.others.items() if isinstance(u, DoraUpdate)}
    needed |= {weight_of(n) for n, u in plan.adapter.others.items() if isinstance(u, DenseUpdate)}
    for job in plan.jobs:
        if job.name in needed and job.name not in low_rank:
            own = f"{key}:{job.name}"
            low_rank[job.name] = nothing_like(job.update, plan.dtype, job.scale, own)
    lost = sorted(names - set(low_rank))
    if lost:
        notes.append(
            f"{counted(len(lost), 'update is', 'updates are')} zero at this rank and absent "
            f"({lost[0]})"
        )
    if plan.adapter.base_copies:
        notes.append(
            f"{len(plan.adapter.base_copies)} unchanged base weights that the adapter carries were "
            "left out"
        )
    if plan.uniform:
        low_rank = at_one_rank(low_rank, key)
    low_rank = completed(low_rank, [job.name for job in plan.jobs], key)
    updates = {
        name: new
        for name, old in plan.adapter.updates.items()
        for new in [_resized(plan, name, old, low_rank)]
        if new is not None
    }
    adapter = replace(plan.adapter, updates=updates, format=peft.NAME, base_copies={})
    return adapter, notes


def _resized(
    plan: ResizePlan, name: str, old: Update, low_rank: Mapping[str, LowRankUpdate]
) -> Update | None:
    """What stands for an update now; None where nothing is left of it."""
    if isinstance(old, LowRankUpdate):
        return low_rank.get(name)
    if isinstance(old, DoraUpdate):
        return replace(old, low_rank=low_rank[name])
    if isinstance(old, DenseUpdate):
        module = low_rank[weight_of(name)]
        if module.scale == old.scale:
            return old
        exact = load_bias(str(plan.path), name, old).dense()[:, 0]
        return store_bias(name, exact, module, plan.dtype).update
    return old
