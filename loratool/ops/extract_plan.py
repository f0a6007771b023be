"""What an extraction will do, decided from headers and configs before a tensor is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, ModuleKind
from loratool.algebra.budget import parse_size
from loratool.algebra.ranks import RankLimits, RankRule
from loratool.engine.devices import resolve_device
from loratool.errors import UsageError
from loratool.layouts.config import is_hub_id
from loratool.layouts.pairs import Alignment, align, check_floats
from loratool.layouts.past_modules import is_read_past_its_module
from loratool.layouts.patterns import select
from loratool.layouts.scales import refuse_scaled
from loratool.layouts.splitting import split_pairs
from loratool.layouts.targets import targeted
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_biases import as_differences
from loratool.ops.extract_forecast import Forecast, forecast
from loratool.ops.extract_into import continue_from
from loratool.ops.extract_jobs import ExtractJob, Treatment
from loratool.ops.extract_rules import BUDGET, Rules, read_rules
from loratool.ops.extract_treatments import (
    LOW_RANK_KINDS,
    is_grouped_convolution,
    treatments,
)
from loratool.ops.sources import Model, open_adapter, open_model
from loratool.plural import counted, first_of
from loratool.profiles import Profile, find_profile
from loratool.storage.dtypes import BY_NAME, DType, dtype_named
from loratool.storage.outputs import check_free_space, check_output

WHOLE, LORA_BIAS = "whole", "lora_bias"
SKETCH_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExtractPlan:
    """Everything decided before a tensor is read."""

    base: Model
    tuned: Model
    output: Path
    rank: str
    budget: int | None
    dtype: DType
    device: torch.device
    seed: int
    base_model: str | None
    profile: Profile
    drop_rest: bool
    overwrite: bool
    alignment: Alignment
    jobs: tuple[ExtractJob, ...]
    notes: tuple[str, ...]
    into: Path | None

    @property
    def read_bytes(self) -> int:
        return sum(job.cost for job in self.jobs)

    @property
    def likely_bytes(self) -> int:
        """Size of the adapter if every tensor changed, at the ranks that rules look at first."""
        whole = sum(j.likely_output_bytes for j in self.jobs if j.treatment is Treatment.WHOLE)
        if self.budget is not None:
            return whole + self.budget * self.dtype.bits // 8
        return sum(job.likely_output_bytes for job in self.jobs)

    @property
    def forecast(self) -> Forecast:
        """What may be written at most."""
        return forecast(
            self.jobs,
            self.alignment,
            self.profile,
            self.base.config.task_type,
            budget=self.budget,
            drop_rest=self.drop_rest,
        )

    def if_changed(self, job: ExtractJob) -> str:
        """What is done with a tensor that changed."""
        stored = (Treatment.LOW_RANK, Treatment.DIFFERENCE, Treatment.EXCLUDED)
        return "dropped" if self.drop_rest and job.treatment not in stored else str(job.treatment)

    def peak_bytes(self, workers: int) -> int:
        """Working memory: the largest jobs that can run side by side."""
        return sum(sorted((job.memory_bytes for job in self.jobs), reverse=True)[:workers])

    def to_json(self, workers: int) -> dict[str, Any]:
        at_most = self.forecast
        return {
            "rank": self.rank,
            "dtype": self.dtype.name,
            "device": str(self.device),
            "read_bytes": self.read_bytes,
            "adapter_bytes_at_most": at_most.bytes_at_most,
            "peak_bytes": self.peak_bytes(workers),
            "notes": [*self.notes, *at_most.notes],
            "tensors": [
                {
                    "name": job.pair.name,
                    "kind": str(job.pair.kind),
                    "shape": list(job.pair.base.shape),
                    "if_changed": self.if_changed(job),
                }
                for job in self.jobs
            ],
        }


def plan_extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: str | int = 16,
    rank_for: Mapping[str, str | int] | None = None,
    min_rank: int = 1,
    max_rank: int | None = None,
    multiple_of: int = 1,
    conv_rank: str | int | None = None,
    targets: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    drop_rest: bool = False,
    split_fused: bool = False,
    exact: bool = False,
    sketch_dtype: str = "auto",
    seed: int = 0,
    base_model: str | None = None,
    profile: str = "peft",
    into: Path | None = None,
    alpha: float | None = None,
    bias: str = "whole",
    dora: bool = False,
    overwrite: bool = False,
) -> ExtractPlan:
    """Read headers and decide what happens to every tensor. Nothing is written.

    rank_for: pattern → rank, rule or "whole", for the tensors it matches; the last match wins.
    conv_rank: rank or rule of convolutions, or "same" for that of ``rank``; without it they are
    stored whole. sketch_dtype: of the products that steer the randomised method, "auto" for the
    device's fastest. into: an adapter to continue from (see extract_into), alpha: for one that
    stores none. bias: "whole", or "lora_bias" for differences beside the factors (see
    extract_biases). dora: fit DoRA updates (see algebra.dora_fit). targets: see layouts.targets.
    Raises InputError, DisagreementError, UsageError or OutputError, before any long work.
    """
    is_budget = str(rank).startswith(BUDGET)
    limits = RankLimits(min_rank, max_rank, multiple_of)
    rules = read_rules(str(rank), rank_for or {}, conv_rank, limits)
    _check_forms(bias, dora, into)
    target = resolve_device(device)
    if sketch_dtype not in SKETCH_DTYPES:
        raise UsageError(
            f"unknown dtype of the sketch {sketch_dtype!r}",
            hint=f"choose one of {', '.join(SKETCH_DTYPES)}",
        )
    sketch = SKETCH_DTYPES[sketch_dtype]
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not of the form owner/name")
    base_side, tuned_side = open_model(base), open_model(tuned)
    inputs = [*base_side.paths, *tuned_side.paths, *([into] if into else [])]
    check_output(output, overwrite=overwrite, inputs=inputs)
    for side, model in (("base", base_side), ("tuned", tuned_side)):
        tensors = model.checkpoint.tensors
        refuse_scaled(side, tensors, tensors.values())
    alignment = align(
        base_side.checkpoint, tuned_side.checkpoint, base_side.config, tuned_side.config
    )
    if split_fused:
        if profile == "peft":
            raise UsageError(
                "--split-fused names modules that the base does not have; PEFT loads none of them",
                hint="it is for servers: --profile vllm, sglang or llama.cpp",
            )
        alignment = split_pairs(alignment, base_side.config)
    pairs = list(alignment.pairs)
    check_floats(pairs)
    names = [pair.name for pair in pairs]
    chosen = select(names, include, exclude)
    if targets is not None:
        chosen &= targeted(targets, {pair.name: pair.kind for pair in pairs})
    _check_ties(alignment, chosen)
    select(names, list(rules.special), ())  # a pattern that matches nothing is an error
    adapter = None if into is None else open_adapter(into, alpha)
    stored = _adapter_dtype(dtype, tuned_side, adapter)
    treated = treatments(alignment, base_side, rules, chosen)
    jobs = [
        ExtractJob(
            index,
            pair,
            treated[pair.name] if pair.name in chosen else Treatment.EXCLUDED,
            rules.of(pair) or rules.general,
            stored,
            target,
            seed,
            exact,
            scratch=None,
            sketch=sketch,
        )
        for index, pair in enumerate(pairs)
    ]
    budget = _budget(str(rank), stored, base_side) if is_budget else None
    rules.check_used(jobs)
    notes = [*alignment.notes, *_whole_notes(jobs, rules, base_side)]
    if bias == LORA_BIAS:
        jobs, said = as_differences(jobs, alignment)
        notes += said
    if dora:
        _check_dora(jobs, alignment)
        jobs = [replace(job, dora=True) for job in jobs]
    if adapter is not None:
        if rules.general.kind.name == "full":
            raise UsageError("--rank full stores the whole change; --into has nothing to add to it")
        jobs, said = continue_from(adapter, jobs, base_side, drop_rest=drop_rest)
        notes += [*said, *_rounding_note(adapter, stored)]
    elif alpha is not None:
        raise UsageError("--alpha is for the adapter of --into")
    if budget is None:
        _check_rank(jobs)
    plan = ExtractPlan(
        base_side,
        tuned_side,
        output,
        str(rank) if is_budget else str(rules.general),
        budget,
        stored,
        target,
        seed,
        base_model or base_side.config.hub_name,
        find_profile(profile),
        drop_rest,
        overwrite,
        alignment,
        tuple(jobs),
        tuple(notes),
        into,
    )
    check_free_space(output, 2 * plan.likely_bytes)
    return plan


def _check_ties(alignment: Alignment, chosen: Collection[str]) -> None:
    """What is one matrix is stored or left out as one. Raises UsageError."""
    for tie in alignment.ties:
        stored = [pair.name for pair in alignment.pairs if pair.name in tie.names]
        if 0 < len(left := [name for name in stored if name not in chosen]) < len(stored):
            raise UsageError(
                f"{' and '.join(stored)} are tied, and only {left[0]} is left out",
                hint="name both of them, in --include, --exclude or --targets, or none",
            )


def _adapter_dtype(text: str | None, tuned: Model, continued: Adapter | None) -> DType:
    """Of the factors: what was asked for, else the tuned checkpoint's, or a wider one in which an
    adapter's that are continued from stay as they are."""
    if text is not None:
        return dtype_named(text)
    sizes: dict[str, int] = {}
    for info in tuned.checkpoint.tensors.values():
        if info.dtype.name in ("F32", "F16", "BF16"):
            sizes[info.dtype.name] = sizes.get(info.dtype.name, 0) + info.nbytes
    usual = BY_NAME[max(sizes, key=lambda name: sizes[name])] if sizes else BY_NAME["F32"]
    return BY_NAME["F32"] if continued and _dtypes(continued) - {usual.name} else usual


def _dtypes(adapter: Adapter) -> set[str]:
    return {t.dtype.name for update in adapter.factors.values() for t in (update.a, update.b)}


def _rounding_note(adapter: Adapter, stored: DType) -> tuple[str, ...]:
    other = sorted(_dtypes(adapter) - {stored.name})
    if not other or stored.name == "F32":
        return ()
    return (f"the factors of --into, in {' and '.join(other)}, are rounded to {stored.name}",)


def _whole_notes(jobs: Sequence[ExtractJob], rules: Rules, base: Model) -> list[str]:
    """Which matrices a rule asks to factorise and PEFT cannot adapt."""
    names = {job.pair.name for job in jobs}
    whole = [job.pair for job in jobs if job.treatment is Treatment.WHOLE and rules.of(job.pair)]
    grouped = [pair.name for pair in whole if is_grouped_convolution(pair, base)]
    past = [
        pair.name
        for pair in whole
        if pair.kind in LOW_RANK_KINDS and is_read_past_its_module(pair.name, names, base.config)
    ]
    notes = []
    if grouped:
        notes.append(
            "convolutions that are grouped, or may be by their shape, are stored whole if changed, "
            f"since PEFT merges no updates of grouped ones: {first_of(grouped)}"
        )
    if past:
        notes.append(
            "weights that the model reads without calling their modules, where no update of PEFT's "
            f"would act, are stored whole if changed: {first_of(past)}"
        )
    return notes


def _check_forms(bias: str, dora: bool, into: Path | None) -> None:
    if bias not in (WHOLE, LORA_BIAS):
        raise UsageError(f"unknown form of biases {bias!r}", hint="choose whole or lora_bias")
    if dora and (into is not None or bias == LORA_BIAS):
        other = "--into" if into is not None else "--bias lora_bias"
        raise UsageError(f"--dora does not go with {other}")


def _check_dora(jobs: Sequence[ExtractJob], alignment: Alignment) -> None:
    """PEFT has no DoRA of bare parameters, and one setting for all modules."""
    bare = [
        job.pair.name
        for job in jobs
        if job.treatment is Treatment.LOW_RANK
        and (job.pair.kind is ModuleKind.EXPERT or alignment.experts.is_retargeted(job.pair.name))
    ]
    if bare:
        raise UsageError(
            f"--dora: PEFT has none of {counted(len(bare), 'parameter')} of experts",
            details=bare[:12],
            hint="leave them out with --exclude or --targets",
        )


def _budget(rank: str, dtype: DType, base: Model) -> int:
    """Parameters that a budget allows. Raises UsageError."""
    text = rank.removeprefix(BUDGET)
    values = sum(info.numel for info in base.checkpoint.tensors.values())
    parameters = parse_size(text, dtype.bits // 8, values)
    if not parameters:
        raise UsageError(
            f"rank {rank!r}: a budget is a number of parameters, a size or a share of the base",
            hint="for example budget:500000, budget:20MB, budget:2%",
        )
    return parameters


def _check_rank(jobs: Sequence[ExtractJob]) -> None:
    """A fixed rank above a matrix's smaller side is clamped; above every matrix's it is a slip."""
    sides: dict[RankRule, int] = {}
    for job in jobs:
        if job.treatment is Treatment.LOW_RANK:
            sides[job.rule] = max(sides.get(job.rule, 0), min(matrix_shape(job.pair.base.shape)))
    for rule, side in sides.items():
        if rule.clamps(side):
            raise UsageError(
                f"rank {rule.asked} is above the smaller side of every matrix (at most {side})",
                hint="use --rank full to keep everything",
            )
