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
    did. exact: neither could; decided by exact summation.
    """

    name: str
    update: str
    elements: int
    changed: int
    recomputed: int
    exact: int

    def plus(self, elements: int, changed: int, recomputed: int, exact: int) -> MergeRow:
        """The row with another block's counts added."""
        return replace(
            self,
            elements=self.elements + elements,
            changed=self.changed + changed,
            recomputed=self.recomputed + recomputed,
            exact=self.exact + exact,
        )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


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
            rows[part.name] = (
                seen.plus(part.elements, part.changed, part.recomputed, part.exact)
                if seen
                else part
            )
        return MergeReport(tuple(rows[name] for name in sorted(rows)), facts)

    def total(self, field: str) -> int:
        """Sum of one count over all tensors."""
        return sum(getattr(row, field) for row in self.rows)

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
                        for name in ("elements", "changed", "recomputed", "exact")
                    },
                },
                "tensors": [row.to_json() for row in self.rows],
            },
        )
