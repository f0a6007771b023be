"""What each rank would cost and keep, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratool.algebra.ranks import RankLimits, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, Progress
from loratool.ops.extract import resolve_spectra
from loratool.ops.extract_budget import parameters_at, shared_out, stack_sizes
from loratool.ops.extract_plan import ExtractPlan
from loratool.provenance import document

MOST = 64
"""Largest rank looked at, unless --max-rank says otherwise."""


@dataclass(frozen=True)
class TradeoffRow:
    """One uniform rank. error: of all factorised matrices together, before the rounding of
    factors; budget_error: when the same parameters are spent where they lower the error most."""

    rank: int
    parameters: int
    nbytes: int
    error: float
    budget_error: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Tradeoff:
    """Rows by rank, for the matrices that would be factorised."""

    matrices: int
    rows: tuple[TradeoffRow, ...]

    def to_json(self) -> dict[str, Any]:
        body = {"matrices": self.matrices, "ranks": [row.to_json() for row in self.rows]}
        return document("extract-ranks", 1, body)


def rank_tradeoff(
    plan: ExtractPlan, *, max_rank: int | None, engine: Engine, progress: Progress
) -> Tradeoff:
    """Resolve spectra once and say what ranks 1, 2, 4, … would keep."""
    most = max_rank or MOST
    rule = parse_rank_rule("full", RankLimits(most=most))
    looking = replace(plan, jobs=tuple(replace(job, rule=rule) for job in plan.jobs))
    spectra = {
        name: replace(spectrum, values=spectrum.values[:most])
        for name, spectrum in resolve_spectra(looking, engine, progress).items()
    }
    largest = max((len(s.values) for s in spectra.values()), default=0)
    ranks = [2**k for k in range(largest.bit_length()) if 2**k <= largest]
    if ranks and ranks[-1] != largest:
        ranks.append(largest)
    return Tradeoff(len(spectra), tuple(_row(rank, spectra, plan) for rank in ranks))


def _row(rank: int, spectra: Mapping[str, Spectrum], plan: ExtractPlan) -> TradeoffRow:
    every = list(spectra.values())
    stacks = stack_sizes(plan.jobs)
    parameters = parameters_at(rank, spectra, stacks, plan.profile)
    spent, _ = shared_out(spectra, stacks, parameters, plan.profile)
    return TradeoffRow(
        rank,
        parameters,
        parameters * plan.dtype.bits // 8,
        _error(every, [min(rank, len(spectrum.values)) for spectrum in every]),
        _error(every, [spent[name] for name in spectra]),
    )


def _error(spectra: list[Spectrum], ranks: list[int]) -> float:
    total = sum(spectrum.total_energy for spectrum in spectra)
    kept = sum(
        spectrum.energy_at(rank) * spectrum.total_energy
        for spectrum, rank in zip(spectra, ranks, strict=True)
    )
    return float(max(0.0, 1 - kept / total) ** 0.5) if total else 0.0
