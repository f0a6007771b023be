"""What a report shows, as values that an HTML page and a picture are both made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

_FEWEST = 8
"""Values of a curve that are kept however many curves there are."""

MOST_PLACES = 20_000
"""Of a map. Names that somebody made up can ask for any number."""

Cell = str | int | float | None


class Unit(StrEnum):
    """How a column's cells are written. signed: a number from −1 to 1."""

    TEXT = "text"
    NUMBER = "number"
    COUNT = "count"
    SHARE = "share"
    BYTES = "bytes"
    SIGNED = "signed"


@dataclass(frozen=True)
class Column:
    """One figure of every row. mapped: the map can be coloured by it. about: what it is, in words.
    The first mapped column is the one a picture shows."""

    key: str
    label: str
    unit: Unit = Unit.NUMBER
    about: str = ""
    mapped: bool = False


@dataclass(frozen=True)
class Curve:
    """Numbers of one matrix in order: singular values, largest first, or angles, or cosines.

    energy: ‖·‖²_F of the matrix, of which the values hold all or a part. floor: a height to mark,
    as ``floor_label`` says; None where there is none. rank_bytes: what one more rank takes in an
    adapter. rank: one that the report itself names, as ``rank_label`` says. held: how many values
    there are in all, of which the page may hold fewer.
    """

    values: tuple[float, ...]
    label: str = ""
    energy: float = 0.0
    floor: float | None = None
    floor_label: str = "noise floor"
    rank_bytes: float = 0.0
    rank: int | None = None
    rank_label: str = ""
    held: int = 0

    def cut(self, most: int) -> Curve:
        """With at most this many values; ``held`` remembers how many there were."""
        held = self.held or len(self.values)
        return replace(self, values=self.values[:most], held=held)


@dataclass(frozen=True)
class Group:
    """An adapter, or a pair of adapters, that rows belong to. label: ``A``, ``A B``."""

    label: str
    name: str


@dataclass(frozen=True)
class Row:
    """One module. family: its name without numbers. layer: None outside of layers. group: the
    position of the adapter, or pair of adapters, that it belongs to."""

    name: str
    family: str
    layer: int | None
    cells: Mapping[str, Cell]
    curves: tuple[Curve, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class CurveKind:
    """What curves are of. axis, index: what is drawn up and along. most: the largest possible value
    of what is not drawn logarithmically. explorable: singular values, of which a rank keeps the
    first. across: a module's curves of all groups are drawn together."""

    title: str
    axis: str
    index: str
    most: float | None = None
    explorable: bool = False
    across: bool = False


@dataclass(frozen=True)
class SmallTable:
    """A table of the overview. text: positions of the columns that hold no numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class NameList:
    """Names under a heading, folded away."""

    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """Everything that a page says.

    kind: what was looked at. facts: label and value. statements: sentences that matter; notes:
    what else to know. groups: what rows belong to, where there is more than one; group_word: what
    such a group is. still: (family, layer) of what was looked at and has nothing to show, as
    ``still_word`` says. outside_share: of the energy, what lies in rows without a curve.
    """

    kind: str
    title: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = field(repr=False)
    row_word: str = "module"
    statements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()
    group_word: str = "adapter"
    curves: CurveKind | None = None
    still: tuple[tuple[str, int], ...] = ()
    still_word: str = "unchanged"
    tables: tuple[SmallTable, ...] = ()
    lists: tuple[NameList, ...] = ()
    outside_share: float = 0.0

    @property
    def mapped(self) -> tuple[Column, ...]:
        """The columns that the map can show and some row has."""
        return tuple(
            column
            for column in self.columns
            if column.mapped and any(is_number(row.cells.get(column.key)) for row in self.rows)
        )

    def limited(self, most: int) -> Page:
        """With the rows that have the largest figures, at most so many, and a note that says so."""
        if len(self.rows) <= most:
            return self
        key = self.mapped[0].key if self.mapped else ""
        sizes = [_size(row.cells.get(key)) for row in self.rows]
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        kept = sorted(order[:most])
        by = f"those with the largest {self.mapped[0].label}" if self.mapped else "the first"
        note = (
            f"this page holds {most:,} of {len(self.rows):,} {self.row_word}s, {by}, and sums up "
            "no others; --csv and --json have all"
        )
        rows = tuple(self.rows[index] for index in kept)
        return replace(self, rows=rows, still=(), notes=(note, *self.notes))

    @property
    def families(self) -> tuple[str, ...]:
        """The families with layers, in the order of the rows."""
        named = [row.family for row in self.rows if row.layer is not None]
        return tuple(dict.fromkeys([*named, *(family for family, _ in self.still)]))

    @property
    def has_map(self) -> bool:
        """Whether its rows lie in layers, and a map of them has a size that can be looked at."""
        places = len(self.families) * len(self.layers)
        return 0 < places <= MOST_PLACES

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of rows and of what has nothing to show, ascending."""
        found = {row.layer for row in self.rows if row.layer is not None}
        return tuple(sorted(found | {layer for _, layer in self.still}))


def is_number(cell: Cell) -> bool:
    """Whether a cell holds a finite number."""
    return isinstance(cell, int | float) and math.isfinite(cell)


def _size(cell: Cell) -> float:
    return abs(cell) if isinstance(cell, int | float) and math.isfinite(cell) else -1.0


def letter(position: int) -> str:
    """A, B, … Z, A26, B27, …: what an adapter is called in tables and charts."""
    own = chr(ord("A") + position % 26)
    return own if position < 26 else f"{own}{position}"


def values_per_curve(rows: Sequence[Row], total: int) -> int:
    """How many values of each curve to keep so that all together stay about ``total``."""
    curves = sum(len(row.curves) for row in rows)
    return max(_FEWEST, total // max(1, curves))
