"""What is in an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, DoraUpdate, LowRankUpdate
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress, Progress
from loratool.layouts.patterns import select
from loratool.ops.adapter_folder import load_update
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.inspect_values import TensorValues, equal_groups, read_values
from loratool.ops.sources import open_adapter
from loratool.ops.spectra import (
    factor_bytes,
    rank_for,
    ranks_by_share,
    shape_figures,
    sizes_by_share,
)
from loratool.provenance import document
from loratool.storage.tensors import LazyTensor

_B, _A, _MAGNITUDE = " B", " A", " magnitude"
"""What the parts of a low-rank update are called behind their parameter's name."""


@dataclass(frozen=True)
class UpdateRow:
    """One low-rank update. spectrum: at level spectra, all min(r, out, in) values that can differ
    from zero. bits: of a stored value."""

    name: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    bits: int
    spectrum: Spectrum | None = None

    @property
    def norm(self) -> float | None:
        """‖ΔW‖_F."""
        return self.spectrum.norm if self.spectrum else None

    @property
    def stable_rank(self) -> float | None:
        return self.spectrum.stable_rank() if self.spectrum else None

    @property
    def values(self) -> tuple[float, ...]:
        """The singular values."""
        return tuple(self.spectrum.values.tolist()) if self.spectrum else ()

    def rank_for(self, share: float) -> int | None:
        """Smallest rank that keeps this share of ‖ΔW‖²; None without a spectrum."""
        return rank_for(self.spectrum, share)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank": self.rank,
            "alpha": self.alpha,
            "scale": self.scale,
            "norm": self.norm,
            **shape_figures(self.spectrum, complete=True),
            "rank_for": ranks_by_share(self.spectrum),
            "values": list(self.values),
        }


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
    level: Level = Level.SPECTRA
    values: tuple[TensorValues, ...] = ()
    """At level values: what one pass over each stored tensor found."""

    def adapter_bytes(self, share: float) -> tuple[int, bool]:
        """As of a pair: the size at ranks that keep this share of each update's energy."""
        return factor_bytes(self._spectra(), share)

    def _spectra(self) -> list[tuple[Spectrum, int]]:
        return [(row.spectrum, row.bits) for row in self.rows if row.spectrum is not None]

    @property
    def zero_b(self) -> tuple[str, ...]:
        """Updates whose B is zero, as it is before training: they change nothing."""
        return tuple(
            row.name.removesuffix(_B)
            for row in self.values
            if row.name.endswith(_B) and row.health is not None and row.health.is_zero
        )

    @property
    def equal(self) -> tuple[tuple[str, ...], ...]:
        """Stored tensors of equal values: layers replicated."""
        return equal_groups(self.values)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "what": "adapter",
            "level": str(self.level),
            "name": self.name,
            "format": self.format,
            "base_model": self.base_model,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "adapter_bytes": sizes_by_share(self._spectra()),
            "updates": [row.to_json() for row in self.rows],
            "replaced": list(self.replaced),
            "others": list(self.others),
        }
        if self.level is Level.VALUES:
            body["values"] = [row.to_json() for row in self.values]
            body["equal"] = [list(names) for names in self.equal]
            body["zero_b"] = list(self.zero_b)
        return document("inspect", SCHEMA_VERSION, body)


def inspect_adapter(
    path: Path,
    level: Level = Level.SPECTRA,
    *,
    only: Sequence[str] = (),
    alpha: float | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AdapterReport:
    """What an adapter's headers say; at level values what one pass over it finds; at level spectra
    norm and exact spectrum of every low-rank update, through the small core.

    only: globs over names. Without ``alpha``, for formats that do not store it, is a UsageError.
    Raises InputError, and NonFiniteValues at level spectra.
    """
    adapter = open_adapter(path, alpha)
    return describe_adapter(path, adapter, level, only=only, engine=engine, progress=progress)


def describe_adapter(
    path: Path,
    adapter: Adapter,
    level: Level,
    *,
    only: Sequence[str] = (),
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> AdapterReport:
    """What ``inspect_adapter`` tells of an adapter that is open. Raises InputError."""
    chosen = select(list(adapter.updates), only, ())
    adapter = replace(
        adapter, updates={n: update for n, update in adapter.updates.items() if n in chosen}
    )
    engine, progress = engine or Engine(), progress or NoProgress()
    jobs = list(adapter.low_rank.items())
    if level is Level.SPECTRA:
        rows = engine.map(
            _with_spectrum,
            jobs,
            cost=lambda job: job[1].rank * sum(job[1].shape) * 4,
            progress=progress,
            what="reading the adapter",
        )
    else:
        rows = [_row(name, update) for name, update in jobs]
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
        level,
        read_values(_stored(adapter), engine, progress) if level is Level.VALUES else (),
    )


def _row(name: str, update: LowRankUpdate) -> UpdateRow:
    bits = max(update.b.dtype.bits, update.a.dtype.bits)
    return UpdateRow(name, update.shape, update.rank, update.alpha, update.scale, bits)


def _with_spectrum(job: tuple[str, LowRankUpdate]) -> UpdateRow:
    name, update = job
    value = load_update(name, update, torch.device("cpu"))
    return replace(_row(name, update), spectrum=value.spectrum())


def _stored(adapter: Adapter) -> list[tuple[str, LazyTensor]]:
    """Every tensor under its parameter's name and its part."""
    named = []
    for name, update in adapter.updates.items():
        low_rank = update.low_rank if isinstance(update, DoraUpdate) else update
        parts = [_B, _A] if isinstance(low_rank, LowRankUpdate) else []
        parts += [_MAGNITUDE] if isinstance(update, DoraUpdate) else []
        if not parts:
            count = len(update.tensors)
            parts = [f" {index + 1}" for index in range(count)] if count > 1 else [""]
        named += [(f"{name}{part}", t) for part, t in zip(parts, update.tensors, strict=True)]
    return named
