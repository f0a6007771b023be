"""What an extraction did, tensor by tensor and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loratool.algebra.noise import BIASED
from loratool.ops.findings import lora_summary
from loratool.provenance import document

SCHEMA_VERSION = 1


class Status(StrEnum):
    """Where a tensor ended. Every tensor ends in exactly one."""

    UNCHANGED = "unchanged"
    LOW_RANK = "low-rank"
    WHOLE = "stored whole"
    DIFFERENCE = "stored as a difference"
    NEW_ROWS = "new rows stored"
    EXCLUDED = "excluded"
    NOT_MEASURED = "excluded and not measured"
    BELOW_RULE = "below the rank rule"
    DROPPED = "dropped"
    NO_PLACE = "no place"


LEFT_OUT = (
    Status.EXCLUDED,
    Status.NOT_MEASURED,
    Status.BELOW_RULE,
    Status.DROPPED,
    Status.NO_PLACE,
)


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the report.

    delta_norm: ‖W − W0‖_F. base_norm: ‖W0‖_F. relative_error: ‖D − s·B·A‖_F / ‖D‖_F of the
    factors as stored. singular_values: those kept. excess_bound: what the factors miss beyond the
    best ones of their rank, at most, before their rounding; it fails with probability ``failure``
    (see algebra.certificate). noise_floor: singular values below it cannot be told from rounding;
    noise_share: √(Σ ulp²/12) / ‖D‖, the share of rounding in the change, whose singular values are
    biased low where it is large (near_noise).
    kept_rank: of the update continued from, which ``rank`` counts; rest_norm: ‖D − s·B·A‖_F of that
    update alone, to which method, singular_values and excess_bound refer then.
    lora_rank, lora_least: the rank of the LoRA that explains the change to within rounding, if one
    does, at most and at least (see algebra.lora_test);
    lora_tail: the share of ‖D‖ that a further change could have without being noticed (None where
    the question cannot be decided). added_rows: tokens that the tuned table has beyond the base's;
    norms and errors are of the rows that both have. tied_to: the name under which the same matrix
    is counted.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    status: Status
    delta_norm: float = 0.0
    base_norm: float = 0.0
    rank: int | None = None
    relative_error: float | None = None
    clamped: bool = False
    method: str | None = None
    singular_values: tuple[float, ...] = ()
    excess_bound: float | None = None
    failure: float | None = None
    noise_floor: float = 0.0
    noise_share: float = 0.0
    changed_share: float = 0.0
    lora_rank: int | None = None
    lora_least: int | None = None
    lora_tail: float | None = None
    kept_rank: int | None = None
    rest_norm: float | None = None
    added_rows: int = 0
    tied_to: str | None = None

    @property
    def energy(self) -> float:
        """‖D‖²_F; of a matrix with several names once."""
        return 0.0 if self.tied_to else self.delta_norm**2

    @property
    def near_noise(self) -> bool:
        """Whether rounding biases the singular values low."""
        return self.noise_share >= BIASED

    @property
    def energy_kept(self) -> float | None:
        """Share of ‖D‖² that the stored form gives back: 1 − relative_error²."""
        if self.status in LEFT_OUT:
            return 0.0
        return None if self.relative_error is None else 1 - self.relative_error**2

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "added_rows": self.added_rows,
            "tied_to": self.tied_to,
            "status": str(self.status),
            "delta_norm": self.delta_norm,
            "base_norm": self.base_norm,
            "rank": self.rank,
            "kept_rank": self.kept_rank,
            "rest_norm": self.rest_norm,
            "relative_error": self.relative_error,
            "energy_kept": self.energy_kept,
            "clamped": self.clamped,
            "method": self.method,
            "excess_bound": self.excess_bound,
            "excess_bound_failure_probability": self.failure,
            "noise_floor": self.noise_floor,
            "noise_share": self.noise_share,
            "near_noise": self.near_noise,
            "changed_share": self.changed_share,
            "lora_rank": self.lora_rank,
            "lora_least": self.lora_least,
            "lora_tail": self.lora_tail,
            "singular_values": list(self.singular_values),
        }


def factorised(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """The changed matrices that a rank rule was applied to."""
    return [row for row in rows if row.method or row.status is Status.BELOW_RULE]


@dataclass(frozen=True)
class ExtractReport:
    """An extraction's outcome. Names are relative: the file travels with the adapter.

    seconds: how long the stages took, added up over the workers. Not in the file, which is the same
    whenever and by however many workers it is made.
    """

    rows: tuple[TensorRow, ...]
    rank: str
    dtype: str
    device: str
    seed: int
    base_model: str | None
    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    notes: tuple[str, ...]
    adapter_parameters: int
    adapter_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        rows: Sequence[TensorRow],
        *,
        stored: tuple[int, int],
        rank: str,
        dtype: str,
        device: str,
        seed: int,
        base_model: str | None,
        base: Mapping[str, Any],
        tuned: Mapping[str, Any],
        notes: tuple[str, ...],
    ) -> ExtractReport:
        return ExtractReport(
            tuple(rows), rank, dtype, device, seed, base_model, base, tuned, notes, *stored
        )

    def count(self, *statuses: Status) -> int:
        """How many tensors ended so."""
        return sum(row.status in statuses for row in self.rows)

    @property
    def energy(self) -> float:
        """Σ ‖D‖² over all tensors."""
        return sum(row.energy for row in self.rows)

    @property
    def relative_error(self) -> float:
        """What base + adapter misses of the whole change, as a share of its norm."""
        missed = sum(row.energy * (1 - (row.energy_kept or 0.0)) for row in self.rows if row.energy)
        return float((missed / self.energy) ** 0.5) if self.energy else 0.0

    @property
    def left_out_share(self) -> float:
        """Share of the change's energy in tensors that were left out altogether."""
        lost = sum(row.energy for row in self.rows if row.status in LEFT_OUT)
        return lost / self.energy if self.energy else 0.0

    def lora_summary(self) -> str | None:
        """Whether the change is a LoRA's, in words; None where no spectrum was resolved."""
        asked = [
            row
            for row in factorised(self.rows)
            if row.kept_rank is None
            and row.method
            and (row.singular_values or row.status is Status.BELOW_RULE)
        ]
        others = len(self.rows) - self.count(Status.UNCHANGED, Status.NOT_MEASURED) - len(asked)
        return lora_summary(asked, "any rank up to those extracted", others)

    def timed_json(self) -> dict[str, Any]:
        """The document with ``seconds``, for whoever watches this run."""
        return self.to_json() | {"seconds": dict(self.seconds)}

    def to_json(self) -> dict[str, Any]:
        """The document that travels with the adapter."""
        return document(
            "extract",
            SCHEMA_VERSION,
            {
                "rank": self.rank,
                "dtype": self.dtype,
                "device": self.device,
                "seed": self.seed,
                "base_model": self.base_model,
                "base": dict(self.base),
                "tuned": dict(self.tuned),
                "lora": self.lora_summary(),
                "notes": list(self.notes),
                "totals": {
                    "delta_norm": self.energy**0.5,
                    "relative_error": self.relative_error,
                    "energy_kept": 1 - self.relative_error**2,
                    "low_rank": self.count(Status.LOW_RANK),
                    "stored_whole": self.count(Status.WHOLE),
                    "unchanged": self.count(Status.UNCHANGED),
                    "left_out": self.count(*LEFT_OUT),
                    "left_out_share": self.left_out_share,
                    "adapter_parameters": self.adapter_parameters,
                    "adapter_bytes": self.adapter_bytes,
                },
                "tensors": [row.to_json() for row in self.rows],
            },
        )
