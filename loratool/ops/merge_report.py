"""What a merge did, tensor by tensor and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratool.provenance import document

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MergeRow:
    """One changed tensor; counts of elements.

    changed: differ from the base. recomputed: float32 could not decide their rounding, float64
    did. exact: neither could; decided by exact summation. overflowed: became infinite, where that
    was allowed. lost_energy, update_energy: ‖M − Y‖² and ‖Y − W0‖² of the merged weights M, the
    exact ones Y and the base's W0, where that was asked for.
    """

    name: str
    update: str
    elements: int
    changed: int
    recomputed: int
    exact: int
    overflowed: int = 0
    lost_energy: float = 0.0
    update_energy: float = 0.0

    def plus(
        self,
        elements: int,
        changed: int,
        recomputed: int,
        exact: int,
        *,
        overflowed: int = 0,
        lost_energy: float = 0.0,
        update_energy: float = 0.0,
    ) -> MergeRow:
        """The row with another block's counts added."""
        return replace(
            self,
            elements=self.elements + elements,
            changed=self.changed + changed,
            recomputed=self.recomputed + recomputed,
            exact=self.exact + exact,
            overflowed=self.overflowed + overflowed,
            lost_energy=self.lost_energy + lost_energy,
            update_energy=self.update_energy + update_energy,
        )

    def joined(self, other: MergeRow) -> MergeRow:
        """This and another part of the same tensor."""
        counts = vars(other) | {"name": None, "update": None}
        return self.plus(**{name: count for name, count in counts.items() if count is not None})

    @property
    def lost_share(self) -> float | None:
        """Share of the update's energy that rounding swallowed; None where nobody asked."""
        return self.lost_energy / self.update_energy if self.update_energy else None

    def stored(self) -> dict[str, Any]:
        """All fields, from which the row can be made again."""
        return dict(vars(self))

    def to_json(self) -> dict[str, Any]:
        counts = self.stored()
        del counts["lost_energy"], counts["update_energy"]
        return counts | {"lost_share": self.lost_share}


@dataclass(frozen=True)
class MergeReport:
    """A merge's outcome. facts: what the plan knew (inputs, scale, notes)."""

    rows: tuple[MergeRow, ...]
    facts: Mapping[str, Any]

    @staticmethod
    def of(facts: Mapping[str, Any], parts: Sequence[MergeRow]) -> MergeReport:
        """Put the parts of each tensor together."""
        rows: dict[str, MergeRow] = {}
        for part in parts:
            seen = rows.get(part.name)
            rows[part.name] = seen.joined(part) if seen else part
        return MergeReport(tuple(rows[name] for name in sorted(rows)), facts)

    def total(self, field: str) -> int:
        """Sum of one count over all tensors."""
        return sum(getattr(row, field) for row in self.rows)

    @property
    def lost_share(self) -> float | None:
        """As of a row, over all tensors together."""
        lost = sum(row.lost_energy for row in self.rows)
        energy = sum(row.update_energy for row in self.rows)
        return lost / energy if energy else None

    def to_json(self) -> dict[str, Any]:
        return document(
            "merge",
            SCHEMA_VERSION,
            {
                **self.facts,
                "totals": {
                    "tensors_changed": len(self.rows),
                    **{
                        name: self.total(name)
                        for name in ("elements", "changed", "recomputed", "exact", "overflowed")
                    },
                    "lost_share": self.lost_share,
                },
                "tensors": [row.to_json() for row in self.rows],
            },
        )
