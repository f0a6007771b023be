"""How alike adapters are, module by module, and what combining them would do to each."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    Replacement,
    TokenRows,
)
from loratool.adapter.forms import FormFactor
from loratool.algebra.comparison import compare_jointly, compare_pair, linear_survival
from loratool.algebra.entrywise import read_entries, sign_agreement, ties_survival
from loratool.algebra.initial import RowStatistics, judge_start, row_statistics
from loratool.algebra.lowrank import LowRank
from loratool.algebra.subspaces import phi_grid, row_basis
from loratool.engine import Engine, NoProgress, Progress
from loratool.errors import (
    DisagreementError,
    NothingMatches,
    RangeOverflow,
    UnsupportedInput,
    UsageError,
)
from loratool.layouts.names import match_names, near_misses
from loratool.layouts.patterns import select
from loratool.ops.adapter_folder import load_update
from loratool.ops.compare_advice import advise
from loratool.ops.compare_report import (
    AdapterSummary,
    CompareReport,
    ModuleRow,
    PairRow,
    PairTotals,
    PhiGrid,
)
from loratool.ops.low_rank_forms import in_low_rank_form
from loratool.ops.sources import open_adapters
from loratool.plural import counted

_NOT_COMPARED = {
    DoraUpdate: ("DoRA", "DoRA"),
    KasaUpdate: ("KaSA", "KaSA"),
    HadamardUpdate: ("LoHa", "LoHa"),
    KroneckerUpdate: ("LoKr", "LoKr"),
    DenseUpdate: ("difference", "differences"),
    TokenRows: ("table of trained tokens", "tables of trained tokens"),
    Replacement: ("parameter stored whole", "parameters stored whole"),
}

_LARGEST = 1e100
"""Of an update's elements: its square, summed, must stay within float64."""

SAMPLE = 2**20
"""Entries of a matrix that signs are counted on, unless asked otherwise."""

TIES_DENSITY = 0.2
"""Share of entries that TIES keeps: its paper's and everybody's default."""

JOINT_SHARE = 0.99
"""Energy of the adapters' sum that its stated rank keeps."""


@dataclass(frozen=True)
class _Job:
    """One module: the updates of those adapters that have it, by the adapters' positions."""

    name: str
    labels: tuple[str, ...]
    updates: tuple[tuple[int, LowRankUpdate], ...]
    sample: int

    @property
    def cost(self) -> int:
        return sum(update.rank * sum(update.shape) * 4 for _, update in self.updates)


@dataclass(frozen=True)
class _Compared:
    """One module's row, its inner products, and its factors' share in the question of the start."""

    row: ModuleRow
    inner: Tensor
    starts: dict[tuple[int, int], RowStatistics]


def compare(
    paths: Sequence[Path],
    *,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sample: int = SAMPLE,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Measure two or more adapters of one model against each other.

    Subspaces, norms and inner products are exact, through the small cores in float64; figures on
    signs come from at most ``sample`` entries of each module. Raises UsageError, InputError,
    NothingMatches when no two adapters share a module, and DisagreementError when a module has
    different shapes.
    """
    if len(paths) < 2:
        raise UsageError("one adapter cannot be compared", hint="name two or more")
    labels = [str(path) for path in paths]
    adapters, form_notes = _opened(paths, alpha)
    modules, notes = _matched(adapters, labels)
    notes = form_notes + notes
    chosen = select(list(modules), include, exclude)
    modules = {name: updates for name, updates in modules.items() if name in chosen}
    _check_shapes(modules, labels)
    if not any(len(updates) > 1 for updates in modules.values()):
        raise _nothing_shared(modules, labels)
    compared = (engine or Engine()).map(
        _compare_module,
        [_Job(name, tuple(labels), tuple(us.items()), sample) for name, us in modules.items()],
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="comparing",
    )
    return _report(paths, adapters, compared, tuple(notes))


def _opened(paths: Sequence[Path], alpha: float | None) -> tuple[list[Adapter], list[str]]:
    """The adapters, LoHa and LoKr in low-rank form where they have one, and notes."""
    adapters, notes = [], []
    for path, opened in zip(paths, open_adapters(paths, alpha), strict=True):
        adapter, said = in_low_rank_form(opened)
        adapters.append(adapter)
        notes += [f"{path}: {note}" for note in said]
    return adapters, notes


def _matched(
    adapters: Sequence[Adapter], labels: Sequence[str]
) -> tuple[dict[str, dict[int, LowRankUpdate]], list[str]]:
    """Module names, as the first adapter that has them spells them → position → update."""
    modules: dict[str, dict[int, LowRankUpdate]] = {}
    notes = []
    for position, (adapter, label) in enumerate(zip(adapters, labels, strict=True)):
        found = match_names(adapter.low_rank, set(modules))
        if found.note:
            notes.append(f"{found.note} of {label} with those before it")
        for name, update in adapter.low_rank.items():
            entry = modules.setdefault(found.found.get(name, name), {})
            if position in entry:
                raise DisagreementError(f"{label}: two updates are both {name}")
            entry[position] = update
        left_out = Counter(
            _NOT_COMPARED[type(update)]
            for update in adapter.updates.values()
            if not isinstance(update, LowRankUpdate)
        )
        if left_out:
            kinds = ", ".join(counted(count, *kind) for kind, count in left_out.items())
            notes.append(f"{label}: not compared, only low-rank updates are: {kinds}")
    return modules, notes


def _check_shapes(modules: dict[str, dict[int, LowRankUpdate]], labels: Sequence[str]) -> None:
    for name, updates in modules.items():
        (first, one), *others = updates.items()
        if 0 in one.shape:
            raise UnsupportedInput(
                f"{labels[first]}: {name}: the update is empty, {list(one.shape)}",
                hint=f"leave it out with --exclude {name}",
            )
        for position, other in others:
            if other.shape != one.shape:
                raise DisagreementError(
                    f"{name}: the update has shape {list(one.shape)} in {labels[first]} and "
                    f"{list(other.shape)} in {labels[position]}",
                    hint="adapters of different models, or of different sizes of one model",
                )


def _nothing_shared(
    modules: dict[str, dict[int, LowRankUpdate]], labels: Sequence[str]
) -> NothingMatches:
    details = []
    for position, label in enumerate(labels):
        own = [name for name, updates in modules.items() if position in updates]
        others = [name for name, updates in modules.items() if position not in updates]
        alike = near_misses(own[0], others) if own and others else []
        text = own[0] if own else "no low-rank update"
        details.append(f"{label}: {text}" + (f"   closest elsewhere: {alike[0]}" if alike else ""))
    return NothingMatches(
        "the adapters have no module in common",
        details=details,
        hint="are they made for the same model?",
    )


def _compare_module(job: _Job) -> _Compared:
    values = [_measurable(f"{job.labels[i]}: {job.name}", update) for i, update in job.updates]
    positions = [position for position, _ in job.updates]
    svds = [value.svd() for value in values]
    inner = torch.zeros(len(values), len(values), dtype=torch.float64, device="cpu")
    for i, svd in enumerate(svds):
        inner[i, i] = svd.values.square().sum()
    pairs, starts = [], {}
    entries = read_entries(values, job.sample, key=f"compare:{job.name}") if values[1:] else None
    for i, j in itertools.combinations(range(len(values)), 2):
        assert entries is not None
        measures = compare_pair(svds[i], svds[j])
        inner[i, j] = inner[j, i] = measures.inner
        pair = (positions[i], positions[j])
        first, second = job.updates[i][1], job.updates[j][1]
        statistics = None
        if first.a.shape == second.a.shape and not _computed(first, second):
            statistics = starts[pair] = row_statistics(*_a_factors(first, second))
        pairs.append(
            PairRow.of(
                pair,
                measures,
                sign_agreement(entries.values[i], entries.values[j]),
                statistics.cosine if statistics else None,
                _phi_of_factors(first, second),
            )
        )
    row = ModuleRow(
        job.name,
        values[0].shape,
        tuple(positions),
        tuple(update.rank for _, update in job.updates),
        tuple(len(svd.values) for svd in svds),
        tuple(math.sqrt(energy) for energy in inner.diagonal().tolist()),
        tuple(pairs),
        compare_jointly(values, svds, JOINT_SHARE),
        tuple(linear_survival(inner)),
        ties_survival(entries.values, TIES_DENSITY) if entries else None,
        entries.looked_at if entries else 0,
    )
    return _Compared(row, inner, starts)


def _computed(*updates: LowRankUpdate) -> bool:
    """Whether the A of any is not a factor that was trained, but one made of such."""
    return any(isinstance(update.a, FormFactor) for update in updates)


def _measurable(what: str, update: LowRankUpdate) -> LowRank:
    """Raises NonFiniteValues, and RangeOverflow where squares would leave float64."""
    value = load_update(what, update, torch.device("cpu"))
    size = math.prod(float(factor.double().abs().max()) for factor in (value.b, value.a))
    size *= abs(value.scale)
    if size > _LARGEST:
        raise RangeOverflow(f"{what}: values up to {size:.1g} are too large to be measured")
    return value.T if update.is_embedding else value


def _a_factors(*updates: LowRankUpdate) -> list[Tensor]:
    return [update.a.read().flatten(1) for update in updates]


def _phi_of_factors(first: LowRankUpdate, second: LowRankUpdate) -> PhiGrid:
    one, two = (row_basis(a) for a in _a_factors(first, second))
    return PhiGrid.of(phi_grid(one.T @ two))


def _report(
    paths: Sequence[Path],
    adapters: Sequence[Adapter],
    compared: Sequence[_Compared],
    notes: tuple[str, ...],
) -> CompareReport:
    rows = tuple(item.row for item in compared)
    count = len(adapters)
    inner = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for item in compared:
        where = torch.tensor(item.row.adapters, device="cpu")
        inner[where[:, None], where[None, :]] += item.inner
    energy = inner.diagonal()
    summaries = tuple(
        AdapterSummary(
            path.resolve().name,
            adapter.format,
            adapter.base_model,
            sum(position in row.adapters for row in rows),
            tuple(row.name for row in rows if row.adapters == (position,)),
            math.sqrt(float(energy[position])),
        )
        for position, (path, adapter) in enumerate(zip(paths, adapters, strict=True))
    )
    totals = []
    for i, j in itertools.combinations(range(count), 2):
        size = math.sqrt(energy[i]) * math.sqrt(energy[j])
        starts = [item.starts[i, j] for item in compared if (i, j) in item.starts]
        totals.append(
            PairTotals.of(
                (i, j), rows, float(inner[i, j]) / size if size else None, judge_start(starts)
            )
        )
    report = CompareReport(summaries, rows, tuple(totals), tuple(linear_survival(inner)), notes)
    return replace(report, advice=advise(report))
