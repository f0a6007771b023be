"""What an unmerge restored, tensor by tensor and in total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.provenance import document

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class UnmergeRow:
    """One restored tensor; counts of elements.

    corrected: set right by the receipt. uncertain: without a receipt, those for which another
    base weight would have merged to the same value, or none would.
    """

    name: str
    elements: int
    corrected: int
    uncertain: int


@dataclass(frozen=True)
class UnmergeReport:
    """An unmerge's outcome. facts: what the plan knew."""

    rows: tuple[UnmergeRow, ...]
    facts: Mapping[str, Any]

    def total(self, field: str) -> int:
        """Sum of one count over all tensors."""
        return sum(getattr(row, field) for row in self.rows)

    @property
    def exact(self) -> bool:
        """Whether every tensor is the base's, by its hash."""
        return bool(self.facts["exact"])

    @property
    def uncertain_share(self) -> float:
        """Of the elements in changed tensors."""
        return self.total("uncertain") / max(1, self.total("elements"))

    def to_json(self) -> dict[str, Any]:
        return document(
            "unmerge",
            SCHEMA_VERSION,
            {
                **self.facts,
                "totals": {
                    "tensors_restored": len(self.rows),
                    "uncertain_share": self.uncertain_share,
                    **{name: self.total(name) for name in ("elements", "corrected", "uncertain")},
                },
                "tensors": [dict(vars(row)) for row in self.rows],
            },
        )
