"""What combining or resizing did, weight by weight and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.provenance import document

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class UpdateRow:
    """One weight of the result.

    shape: (out, in) as the adapter's module has it. ranks: those of the inputs, 0 where one has
    nothing for this weight. rank: 0 where the result is zero and so is absent. norm: ‖ΔW‖_F of the
    exact result of the method. relative_error: ‖ΔW − stored‖_F / ‖ΔW‖_F of the factors as stored.
    how: how the factors were found.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int
    norm: float
    relative_error: float
    how: str

    @property
    def energy(self) -> float:
        """‖ΔW‖²_F."""
        return self.norm**2

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "shape": list(self.shape),
            "ranks": list(self.ranks),
            "weights": list(self.weights),
        }


@dataclass(frozen=True)
class UpdatesReport:
    """The outcome of ``command``. facts: what was asked for. Names are relative."""

    command: str
    rows: tuple[UpdateRow, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]
    adapter_parameters: int
    adapter_bytes: int

    @property
    def energy(self) -> float:
        """Σ ‖ΔW‖² over all weights."""
        return sum(row.energy for row in self.rows)

    @property
    def relative_error(self) -> float:
        """What the stored adapter misses of the exact result, as a share of its norm."""
        return error_of(self.rows)

    def to_json(self) -> dict[str, Any]:
        return document(
            self.command,
            SCHEMA_VERSION,
            {
                **self.facts,
                "notes": list(self.notes),
                "totals": {
                    "norm": self.energy**0.5,
                    "relative_error": self.relative_error,
                    "updates": sum(row.rank > 0 for row in self.rows),
                    "zero": sum(row.rank == 0 for row in self.rows),
                    "adapter_parameters": self.adapter_parameters,
                    "adapter_bytes": self.adapter_bytes,
                },
                "updates": [row.to_json() for row in self.rows],
            },
        )


def error_of(rows: Sequence[UpdateRow]) -> float:
    """Relative error of several weights together."""
    energy = sum(row.energy for row in rows)
    missed = sum(row.energy * row.relative_error**2 for row in rows)
    return float((missed / energy) ** 0.5) if energy else 0.0
