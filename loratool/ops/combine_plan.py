"""Reading adapters' headers and deciding how each weight is combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    LowRankUpdate,
    Replacement,
    TokenRows,
    Update,
)
from loratool.algebra.ranks import RankLimits, RankRule, parse_rank_rule
from loratool.combining.method import Method, Value
from loratool.combining.registry import DEFAULT, find_method
from loratool.engine.devices import resolve_device
from loratool.errors import (
    DisagreementError,
    UsageError,
)
from loratool.formats import peft
from loratool.formats.written import DEFAULT as DEFAULT_FORMAT
from loratool.formats.written import WrittenFormat, find_format
from loratool.layouts.patterns import select
from loratool.ops.adapter_folder import dtype_of_factors
from loratool.ops.combine_groups import biases_of, disjoint, groups_of, refuse_both
from loratool.ops.combine_jobs import CombineJob
from loratool.ops.combine_saved import Saved, combine_saved
from loratool.ops.combine_tokens import combine_tokens
from loratool.ops.combine_weights import Source, WeightRule, names_of, parse_rule, weights_of
from loratool.ops.low_rank_forms import in_low_rank_form
from loratool.ops.sources import adapter_sha256, open_adapters
from loratool.ops.stacks import is_indexed
from loratool.plural import counted
from loratool.storage.dtypes import DType
from loratool.storage.outputs import check_free_space, check_output

LARGEST = "largest"
"""Not a rule but a wish: the largest rank that any adapter has at the weight in question."""


@dataclass(frozen=True)
class Combination:
    """What is asked for.

    rank: a rule, or LARGEST; None for the method's own way. alpha: for formats that do not store
    it. format: of the result.
    """

    sources: tuple[Source, ...]
    method: str = DEFAULT
    parameters: Mapping[str, object] = field(default_factory=dict)
    rules: tuple[WeightRule, ...] = ()
    rank: str | None = None
    limits: RankLimits = field(default_factory=RankLimits)
    saved: Saved = Saved.REFUSE
    dtype: str | None = None
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    alpha: float | None = None
    format: str = DEFAULT_FORMAT

    def with_rules(self, texts: Sequence[str]) -> Combination:
        """With weight rules as ``--weight`` takes them. Raises UsageError."""
        return replace(self, rules=tuple(parse_rule(text, self.sources) for text in texts))


@dataclass(frozen=True)
class PlannedTensor:
    """A factor that is still to be computed."""

    dtype: DType
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        raise AssertionError("a planned tensor has no values yet")

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()


@dataclass(frozen=True)
class CombinePlan:
    """Everything decided before a tensor is read.

    biases: by name, each adapter's difference. weights: of every weight and bias. nested: plans of
    the recipes that stand for an adapter, by its place; they run first, and the plan is made again
    from their results.
    """

    asked: Combination
    output: Path
    method: Method
    parameters: Mapping[str, Value]
    rank: str
    dtype: DType
    device: torch.device
    format: WrittenFormat
    overwrite: bool
    adapters: tuple[Adapter, ...]
    jobs: tuple[CombineJob, ...]
    replaced: Mapping[str, Replacement | TokenRows]
    biases: Mapping[str, tuple[DenseUpdate | None, ...]]
    weights: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...]
    nested: Mapping[int, CombinePlan] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        return sum(job.cost for job in self.jobs)

    @property
    def adapter_bytes_at_most(self) -> int:
        """Size of the result if no weight turns out to be zero."""
        whole = sum(_nbytes(update) for update in self.replaced.values())
        factors = sum(job.rank_at_most * sum(job.shape) for job in self.jobs)
        return whole + factors * self.dtype.bits // 8

    def peak_bytes(self, workers: int) -> int:
        """Working memory: the largest jobs that can run side by side."""
        return sum(sorted((job.memory_bytes for job in self.jobs), reverse=True)[:workers])

    def expected(self) -> Adapter:
        """The adapter that will be made, as far as its headers go: its tensors cannot be read."""
        updates: dict[str, Update] = dict(self.replaced)
        for job in self.jobs:
            rank, (rows, columns), like = job.rank_at_most, job.shape, job.like
            b = PlannedTensor(self.dtype, (rows, rank, *(1 for _ in like.kernel[1:])))
            a = PlannedTensor(self.dtype, (rank, *(like.kernel or (columns,))))
            updates[job.name] = LowRankUpdate(b, a, 1.0, float(rank), like.is_embedding)
        for name, found in self.biases.items():
            shape = next(update.shape for update in found if update is not None)
            updates[name] = DenseUpdate(PlannedTensor(self.dtype, shape))
        return replace(self.adapters[0], updates=updates, format=peft.NAME, base_copies={})

    def facts(self) -> dict[str, Any]:
        """What was asked for, for reports. Names only: a push publishes them."""
        return {
            "method": self.method.name,
            "parameters": dict(self.parameters),
            "rank": self.rank,
            "dtype": self.dtype.name,
            "format": self.format.label,
            "device": str(self.device),
            "seed": self.asked.seed,
            "saved": str(self.asked.saved),
            "adapters": [
                {
                    "name": source.name,
                    "weight": source.weight,
                    "format": adapter.format,
                    "base_model": adapter.base_model,
                }
                for source, adapter in zip(self.asked.sources, self.adapters, strict=True)
            ],
        }

    def to_json(self, workers: int) -> dict[str, Any]:
        return {
            **self.facts(),
            "read_bytes": self.read_bytes,
            "adapter_bytes_at_most": self.adapter_bytes_at_most,
            "peak_bytes": self.peak_bytes(workers),
            "notes": list(self.notes),
            "updates": [
                {
                    "name": job.name,
                    "shape": list(job.shape),
                    "ranks": list(job.ranks),
                    "weights": list(job.weights),
                    "rank_at_most": job.rank_at_most,
                }
                for job in self.jobs
            ],
            "stored_whole": sorted(self.replaced),
        }


def plan_combine(
    asked: Combination, output: Path, *, device: str = "auto", overwrite: bool = False
) -> CombinePlan:
    """Read headers and decide about every weight. Nothing is written.

    Raises InputError, DisagreementError, UsageError or OutputError.
    """
    if not asked.sources:
        raise UsageError("no adapters to combine")
    method = find_method(asked.method)
    parameters = method.check(asked.parameters, len(asked.sources))
    rank = _rank_of(asked, method)
    written = find_format(asked.format)
    target = resolve_device(device)
    nested = {
        place: plan_combine(_as_input(source.recipe), nested_output(output, place), device=device)
        for place, source in enumerate(asked.sources)
        if source.recipe is not None
    }
    adapters, form_notes = _opened(asked, nested)
    check_output(output, overwrite=overwrite, inputs=_inputs(asked))
    chosen = select(
        {name: None for adapter in adapters for name in adapter.updates},
        asked.include,
        asked.exclude,
    )
    adapters = tuple(_only(adapter, chosen) for adapter in adapters)
    groups = groups_of(asked.sources, adapters)
    biases = biases_of(asked.sources, adapters, groups)
    whole, saved_notes = combine_saved(asked.sources, adapters, asked.saved)
    tokens, token_notes = combine_tokens(asked.sources, adapters, asked.saved)
    replaced = disjoint(whole, tokens)
    refuse_both(asked.sources, {**groups, **biases}, replaced)
    weights = weights_of([*groups, *biases], asked.sources, asked.rules)
    dtype = dtype_of_factors(
        asked.dtype, (f for group in groups.values() for u in group if u for f in (u.b, u.a))
    )
    jobs = [
        CombineJob(
            index,
            name,
            tuple(source.label for source in asked.sources),
            group,
            weights[name],
            method.name,
            parameters,
            _rule(rank, group, asked.limits),
            dtype,
            target,
            asked.seed,
            is_indexed(name) or written.one_alpha,
        )
        for index, (name, group) in enumerate(groups.items())
    ]
    notes = (*form_notes, *_notes(asked.sources, adapters), *saved_notes, *token_notes)
    plan = CombinePlan(
        asked,
        output,
        method,
        parameters,
        rank or "as it comes",
        dtype,
        target,
        written,
        overwrite,
        adapters,
        tuple(jobs),
        replaced,
        biases,
        weights,
        notes,
        nested,
    )
    written.check(plan.expected())
    check_free_space(output, 2 * plan.adapter_bytes_at_most)
    return plan


def nested_output(output: Path, place: int) -> Path:
    """Where a nested recipe's result would go."""
    return output.parent / f".{output.name}-{place}"


def _as_input(asked: Combination) -> Combination:
    """An intermediate result is not rounded to 16 bits, unless its recipe says so, and in a format
    that holds everything."""
    return replace(asked, dtype=asked.dtype or "float32", format=DEFAULT_FORMAT)


def _inputs(asked: Combination) -> list[Path]:
    paths = []
    for source in asked.sources:
        paths += [source.path] if source.recipe is None else _inputs(source.recipe)
    return paths


def _opened(
    asked: Combination, nested: Mapping[int, CombinePlan]
) -> tuple[tuple[Adapter, ...], list[str]]:
    """Every adapter, in low-rank form as far as it has one; of those still to be made, what is
    known of them. And notes. Raises DisagreementError for files that are not those a recipe was
    written for."""
    files = [(i, source) for i, source in enumerate(asked.sources) if i not in nested]
    opened = open_adapters([source.path for _, source in files], asked.alpha)
    found = dict(zip((place for place, _ in files), opened, strict=True))
    for _, source in files:
        if source.sha256 is not None and adapter_sha256(source.path) != source.sha256:
            raise DisagreementError(
                f"{source.label}: is not the adapter that the recipe was written for",
                hint="its files changed; remove sha256 from the recipe to combine it all the same",
            )
    adapters, notes = [], []
    for place, name in enumerate(names_of(asked.sources)):
        known = nested[place].expected() if place in nested else found[place]
        adapter, said = in_low_rank_form(known)
        adapters.append(adapter)
        notes += [f"{name}: {note}" for note in said]
    return tuple(adapters), notes


def _rank_of(asked: Combination, method: Method) -> str | None:
    if not method.keeps_rank:
        rank = asked.rank or LARGEST
        if rank != LARGEST:
            rank = str(parse_rank_rule(rank, asked.limits))
        return rank
    if asked.rank is not None or asked.limits != RankLimits():
        raise UsageError(
            f"method {method.name} decides its rank itself and takes no --rank",
            hint="--components sets its rank"
            if any(parameter.name == "components" for parameter in method.parameters)
            else "use --method svd to cut the sum",
        )
    return None


def _rule(
    rank: str | None, group: Sequence[LowRankUpdate | None], limits: RankLimits
) -> RankRule | None:
    if rank is None:
        return None
    if rank == LARGEST:
        rank = str(max(update.rank for update in group if update is not None))
    return parse_rank_rule(rank, limits)


def _only(adapter: Adapter, chosen: set[str]) -> Adapter:
    kept = {name: update for name, update in adapter.updates.items() if name in chosen}
    return replace(adapter, updates=kept)


def _notes(sources: Sequence[Source], adapters: Sequence[Adapter]) -> list[str]:
    notes = []
    bases = {adapter.base_model for adapter in adapters if adapter.base_model}
    if len(bases) > 1:
        notes.append(
            f"the adapters were made for different bases ({', '.join(sorted(bases))}); their sum "
            "means something only if these are the same model"
        )
    union = {name for adapter in adapters for name in adapter.low_rank}
    for name, adapter in zip(names_of(sources), adapters, strict=True):
        missing = len(union) - len(adapter.low_rank)
        if missing:
            notes.append(
                f"{name} has no update for {missing} of {counted(len(union), 'weight')}: no update "
                "counts as zero"
            )
    copies = sum(len(adapter.base_copies) for adapter in adapters)
    if copies:
        notes.append(f"{copies} unchanged base weights that the adapters carry were left out")
    return notes


def _nbytes(update: Replacement | TokenRows) -> int:
    value = update.value
    return torch.Size(value.shape).numel() * value.dtype.bits // 8
