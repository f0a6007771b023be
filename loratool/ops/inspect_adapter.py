"""What is in an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import LowRankUpdate
from loratool.algebra.lowrank import LowRank
from loratool.engine import Engine, NoProgress, Progress
from loratool.ops.inspect_level import SCHEMA_VERSION
from loratool.ops.sources import open_adapter
from loratool.provenance import document


@dataclass(frozen=True)
class UpdateRow:
    """One low-rank update. norm: ‖ΔW‖_F. values: its singular values."""

    name: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    norm: float
    stable_rank: float
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "values": list(self.values)}


@dataclass(frozen=True)
class AdapterReport:
    """An adapter: its low-rank updates, what it replaces whole, and updates of other kinds."""

    name: str
    format: str
    base_model: str | None
    rows: tuple[UpdateRow, ...]
    replaced: tuple[dict[str, Any], ...]
    others: tuple[dict[str, Any], ...]
    parameters: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "adapter",
            "name": self.name,
            "format": self.format,
            "base_model": self.base_model,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "updates": [row.to_json() for row in self.rows],
            "replaced": list(self.replaced),
            "others": list(self.others),
        }
        return document("inspect", SCHEMA_VERSION, body)


def inspect_adapter(
    path: Path,
    *,
    alpha: float | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AdapterReport:
    """Norm and exact spectrum of every update, through the small core.

    Without ``alpha``, for formats that do not store it, is a UsageError. Raises InputError.
    """
    adapter = open_adapter(path, alpha)
    jobs = list(adapter.low_rank.items())
    rows = (engine or Engine()).map(
        _update_row,
        jobs,
        cost=lambda job: job[1].rank * sum(job[1].shape) * 4,
        progress=progress or NoProgress(),
        what="reading the adapter",
    )
    sizes = [(torch.Size(tensor.shape).numel(), tensor.dtype.bits) for tensor in adapter.tensors]
    return AdapterReport(
        path.resolve().name,
        adapter.format,
        adapter.base_model,
        tuple(rows),
        tuple(
            {"name": name, "shape": list(update.shape), "dtype": update.value.dtype.name}
            for name, update in adapter.replacements.items()
        ),
        tuple(
            {"name": name, "shape": list(other.shape), "update": other.describe()}
            for name, other in adapter.others.items()
        ),
        sum(numel for numel, _ in sizes),
        sum(numel * bits // 8 for numel, bits in sizes),
    )


def _update_row(job: tuple[str, LowRankUpdate]) -> UpdateRow:
    name, update = job
    value: LowRank = update.load()
    spectrum = value.spectrum()
    return UpdateRow(
        name,
        update.shape,
        update.rank,
        update.alpha,
        update.scale,
        spectrum.norm,
        spectrum.stable_rank(),
        tuple(spectrum.values.tolist()),
    )
