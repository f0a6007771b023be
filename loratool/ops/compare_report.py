"""What compare measured: values, their sums over modules, and their JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loratool.algebra.comparison import JointMeasures, PairMeasures
from loratool.algebra.entrywise import Trimming
from loratool.algebra.initial import StartVerdict
from loratool.algebra.subspaces import degrees
from loratool.provenance import document

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PhiGrid:
    """φ(i, j) at chosen i (rows) and j (columns): powers of two, and the ranks themselves.

    A mean of grids has None where too few have a value.
    """

    i: tuple[int, ...]
    j: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]

    @classmethod
    def of(cls, grid: Tensor) -> PhiGrid:
        """From all (a, b) values."""
        i, j = (_steps(side) for side in grid.shape)
        return cls(i, j, tuple(tuple(float(grid[p - 1, q - 1]) for q in j) for p in i))

    @property
    def whole(self) -> float | None:
        """φ of the whole subspaces; None when one of them is empty."""
        return self.values[-1][-1] if self.i and self.j else None

    def to_json(self) -> dict[str, Any]:
        return {"i": list(self.i), "j": list(self.j), "values": [list(row) for row in self.values]}


def _steps(rank: int) -> tuple[int, ...]:
    powers = itertools.takewhile(lambda step: step < rank, (2**k for k in itertools.count()))
    return (*powers, rank) if rank else ()


def mean_grid(grids: Iterable[PhiGrid]) -> PhiGrid:
    """The mean of each φ(i, j) over the grids that have it, where at least half of them do."""
    seen: dict[tuple[int, int], list[float]] = {}
    count = 0
    for grid in grids:
        count += 1
        for i, row in zip(grid.i, grid.values, strict=True):
            for j, value in zip(grid.j, row, strict=True):
                assert value is not None
                seen.setdefault((i, j), []).append(value)
    often = {where: values for where, values in seen.items() if 2 * len(values) >= count}
    rows = tuple(sorted({where[0] for where in often}))
    columns = tuple(sorted({where[1] for where in often}))
    means = {where: math.fsum(values) / len(values) for where, values in often.items()}
    return PhiGrid(rows, columns, tuple(tuple(means.get((p, q)) for q in columns) for p in rows))


@dataclass(frozen=True)
class PairRow:
    """Two adapters' updates of one module. pair: the adapters' positions. Angles in degrees.

    common: the share of the first's energy that lies in the second's column and row space, and
    of the second's in the first's. start_cosine: of the A factors, where their shapes agree.
    """

    pair: tuple[int, int]
    cosine: float | None
    norm_ratio: float | None
    angles_left: tuple[float, ...]
    angles_right: tuple[float, ...]
    phi_left: PhiGrid
    phi_right: PhiGrid
    phi_a: PhiGrid
    common: tuple[float | None, float | None]
    sign_agreement: float | None
    start_cosine: float | None

    @classmethod
    def of(
        cls,
        pair: tuple[int, int],
        measures: PairMeasures,
        signs: float | None,
        start_cosine: float | None,
        phi_a: PhiGrid,
    ) -> PairRow:
        """From what algebra measured."""
        first, second = measures.first_energy, measures.second_energy
        return cls(
            pair,
            measures.cosine,
            math.sqrt(second / first) if first else None,
            tuple(degrees(measures.angles_left)),
            tuple(degrees(measures.angles_right)),
            PhiGrid.of(measures.phi_left),
            PhiGrid.of(measures.phi_right),
            phi_a,
            (
                min(1.0, measures.first_in_second / first) if first else None,
                min(1.0, measures.second_in_first / second) if second else None,
            ),
            signs,
            start_cosine,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "pair": list(self.pair),
            "cosine": self.cosine,
            "norm_ratio": self.norm_ratio,
            "angles_left": list(self.angles_left),
            "angles_right": list(self.angles_right),
            "phi_left": self.phi_left.to_json(),
            "phi_right": self.phi_right.to_json(),
            "phi_a": self.phi_a.to_json(),
            "common_energy": list(self.common),
            "sign_agreement": self.sign_agreement,
            "a_cosine": self.start_cosine,
        }


@dataclass(frozen=True)
class ModuleRow:
    """One module of those adapters that have it; every tuple is in the order of ``adapters``.

    ranks as stored, numerical_ranks of the updates, norms ‖ΔW‖_F. linear: what the plain sum keeps
    of each update. ties: what TIES keeps, None for a module of one adapter alone. entries: how
    many of the matrix's entries signs and ties come from.
    """

    name: str
    shape: tuple[int, int]
    adapters: tuple[int, ...]
    ranks: tuple[int, ...]
    numerical_ranks: tuple[int, ...]
    norms: tuple[float, ...]
    pairs: tuple[PairRow, ...]
    joint: JointMeasures
    linear: tuple[float | None, ...]
    ties: Trimming | None
    entries: int

    @property
    def is_sampled(self) -> bool:
        """Whether signs come from some rows only."""
        return 0 < self.entries < self.shape[0] * self.shape[1]

    def pair(self, positions: tuple[int, int]) -> PairRow | None:
        """The two adapters' comparison here, if both have the module."""
        return next((row for row in self.pairs if row.pair == positions), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "adapters": list(self.adapters),
            "ranks": list(self.ranks),
            "numerical_ranks": list(self.numerical_ranks),
            "norms": list(self.norms),
            "pairs": [row.to_json() for row in self.pairs],
            "joint": vars(self.joint),
            "survives_sum": list(self.linear),
            "survives_ties_trimming": list(self.ties.kept) if self.ties else None,
            "survives_ties": list(self.ties.survives) if self.ties else None,
            "entries": self.entries,
            "entries_total": self.shape[0] * self.shape[1],
        }


@dataclass(frozen=True)
class AdapterSummary:
    """One of the adapters. norm: √Σ‖ΔW‖² over its compared modules. alone: modules only it has."""

    name: str
    format: str
    base_model: str | None
    modules: int
    alone: tuple[str, ...]
    norm: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "alone": list(self.alone)}


@dataclass(frozen=True)
class PairTotals:
    """Two adapters over all modules.

    cosine: of the whole adapters, modules that one lacks counting as zero there. phi and common
    are means over their shared modules; common is weighted with the energy; sign_agreement with
    the number of entries.
    """

    pair: tuple[int, int]
    shared: int
    cosine: float | None
    phi_left: PhiGrid
    phi_right: PhiGrid
    phi_a: PhiGrid
    phi_left_whole: float | None
    phi_right_whole: float | None
    phi_left_chance: float | None
    phi_right_chance: float | None
    common: tuple[float | None, float | None]
    sign_agreement: float | None
    start: StartVerdict | None

    @classmethod
    def of(
        cls,
        pair: tuple[int, int],
        rows: Sequence[ModuleRow],
        cosine: float | None,
        start: StartVerdict | None,
    ) -> PairTotals:
        """Sums over the modules that both have."""
        both = [(row, found) for row in rows if (found := row.pair(pair)) is not None]
        ranks = [
            tuple(row.numerical_ranks[row.adapters.index(position)] for position in pair)
            for row, _ in both
        ]
        return cls(
            pair,
            len(both),
            cosine,
            mean_grid(found.phi_left for _, found in both),
            mean_grid(found.phi_right for _, found in both),
            mean_grid(found.phi_a for _, found in both),
            _mean((found.phi_left.whole, 1.0) for _, found in both),
            _mean((found.phi_right.whole, 1.0) for _, found in both),
            _mean((max(r) / row.shape[0], 1.0) for (row, _), r in zip(both, ranks, strict=True)),
            _mean((max(r) / row.shape[1], 1.0) for (row, _), r in zip(both, ranks, strict=True)),
            (_common(pair, both, 0), _common(pair, both, 1)),
            _mean((found.sign_agreement, float(math.prod(row.shape))) for row, found in both),
            start,
        )

    def to_json(self) -> dict[str, Any]:
        start = self.start
        return {
            "pair": list(self.pair),
            "shared_modules": self.shared,
            "cosine": self.cosine,
            "phi_left": self.phi_left_whole,
            "phi_right": self.phi_right_whole,
            "phi_left_by_chance": self.phi_left_chance,
            "phi_right_by_chance": self.phi_right_chance,
            "phi_left_grid": self.phi_left.to_json(),
            "phi_right_grid": self.phi_right.to_json(),
            "phi_a_grid": self.phi_a.to_json(),
            "common_energy": list(self.common),
            "sign_agreement": self.sign_agreement,
            "initial_a": {
                "verdict": str(start.start),
                "cosine": start.cosine,
                "distance": start.distance,
                "positive_rows": start.positive,
                "rows": start.rows,
                "chance": start.chance,
            }
            if start
            else None,
        }


def _common(
    pair: tuple[int, int], both: Sequence[tuple[ModuleRow, PairRow]], side: int
) -> float | None:
    return _mean(
        (found.common[side], row.norms[row.adapters.index(pair[side])] ** 2) for row, found in both
    )


def _mean(weighted: Iterable[tuple[float | None, float]]) -> float | None:
    """The weighted mean of the values that exist."""
    known = [(value, weight) for value, weight in weighted if value is not None]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if total else None


@dataclass(frozen=True)
class Advice:
    """A method, its options as typed, and the measurement it follows from."""

    method: str
    options: str
    why: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class CompareReport:
    """Adapters measured against each other, module by module and as wholes.

    linear: what the plain sum of all adapters keeps of each, over all modules.
    """

    adapters: tuple[AdapterSummary, ...]
    rows: tuple[ModuleRow, ...] = field(repr=False)
    pairs: tuple[PairTotals, ...]
    linear: tuple[float | None, ...]
    notes: tuple[str, ...]
    advice: Advice | None = None

    @property
    def shared(self) -> tuple[ModuleRow, ...]:
        """Modules that at least two adapters have."""
        return tuple(row for row in self.rows if row.pairs)

    def ties(self, position: int) -> float | None:
        """Share of one adapter's energy, in shared modules, that TIES leaves."""
        return _mean(
            (row.ties.survives[where], row.norms[where] ** 2)
            for row in self.shared
            if row.ties and position in row.adapters
            for where in (row.adapters.index(position),)
        )

    def to_json(self) -> dict[str, Any]:
        body = {
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "pairs": [pair.to_json() for pair in self.pairs],
            "survives_sum": list(self.linear),
            "survives_ties": [self.ties(position) for position in range(len(self.adapters))],
            "advice": self.advice.to_json() if self.advice else None,
            "notes": list(self.notes),
            "modules": [row.to_json() for row in self.rows],
        }
        return document("compare", SCHEMA_VERSION, body)
