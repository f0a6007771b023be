"""What is in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import UsageError
from loratool.layouts.kinds import classify
from loratool.layouts.patterns import select
from loratool.layouts.quantised import quantisation
from loratool.layouts.ties import find_ties
from loratool.ops.inspect_cost import Costs, costs
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.inspect_values import TensorValues, equal_groups, read_values
from loratool.ops.inspect_weights import WeightRow, weight_spectra
from loratool.ops.sources import open_model
from loratool.provenance import document


@dataclass(frozen=True)
class KindRow:
    """All tensors of one kind."""

    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dtypes": list(self.dtypes)}


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint as its headers describe it."""

    name: str
    architecture: str | None
    files: int
    tied: str | None
    kinds: tuple[KindRow, ...]
    tensors: tuple[dict[str, Any], ...] = field(repr=False)
    level: Level = Level.HEADERS
    quantised: str | None = None
    values: tuple[TensorValues, ...] = field(default=(), repr=False)
    """At level values: what one pass over each tensor found."""
    costs: Costs | None = None
    """Of adapters, where ranks were named."""
    weights: tuple[WeightRow, ...] = field(default=(), repr=False)
    """At level spectra: the spectrum of every weight matrix."""

    @property
    def equal(self) -> tuple[tuple[str, ...], ...]:
        """Tensors of equal values: tied, or layers used again."""
        return equal_groups(self.values)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.kinds)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.kinds)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "what": "checkpoint",
            "level": str(self.level),
            "name": self.name,
            "architecture": self.architecture,
            "files": self.files,
            "tied": self.tied,
            "quantised": self.quantised,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "kinds": [row.to_json() for row in self.kinds],
            "tensors": list(self.tensors),
        }
        if self.level is Level.SPECTRA:
            body["weights"] = [row.to_json() for row in self.weights]
        if self.level is Level.VALUES:
            body["values"] = [row.to_json() for row in self.values]
            body["equal"] = [list(names) for names in self.equal]
        if self.costs is not None:
            body["cost"] = self.costs.to_json()
        return document("inspect", SCHEMA_VERSION, body)


def inspect_checkpoint(
    path: Path,
    level: Level = Level.HEADERS,
    *,
    only: Sequence[str] = (),
    exact: bool = False,
    cost: Sequence[int] = (),
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Describe a checkpoint from headers and config; at level values also from one pass over it, at
    level spectra by the leading singular values of its weights.

    only: globs over names. exact: every singular value. cost: ranks of adapters to tell the cost
    of. Raises InputError, NothingMatches, UsageError.
    """
    if exact and level is not Level.SPECTRA:
        raise UsageError("--exact: goes with --level spectra of a checkpoint")
    engine, progress = engine or Engine(), progress or NoProgress()
    model = open_model(path)
    chosen = select(list(model.checkpoint.tensors), only, ())
    tensors = {n: info for n, info in model.checkpoint.tensors.items() if n in chosen}
    kinds = classify({name: info.shape for name, info in tensors.items()}, model.config)
    ties = find_ties(list(tensors), kinds, model.config)
    rows = []
    for kind in sorted(set(kinds.values()), key=str):
        infos = [tensors[name] for name in tensors if kinds[name] is kind]
        dtypes = tuple(sorted({info.dtype.name for info in infos}))
        parameters, nbytes = sum(i.numel for i in infos), sum(i.nbytes for i in infos)
        rows.append(KindRow(str(kind), len(infos), parameters, nbytes, dtypes))
    return CheckpointReport(
        path.resolve().name,
        model.config.architecture,
        len(model.checkpoint.files),
        "; ".join(map(str, ties)) or None,
        tuple(sorted(rows, key=lambda row: -row.nbytes)),
        tuple(
            {
                "name": name,
                "kind": str(kinds[name]),
                "dtype": info.dtype.name,
                "shape": list(info.shape),
                "bytes": info.nbytes,
            }
            for name, info in tensors.items()
        ),
        level,
        quantisation(tensors, model.config),
        read_values(tensors.items(), engine, progress) if level is Level.VALUES else (),
        costs(tensors, kinds, cost, engine=engine) if cost else None,
        weight_spectra(
            tensors,
            model.config,
            exact=exact,
            device=resolve_device(device),
            engine=engine,
            progress=progress,
        )
        if level is Level.SPECTRA
        else (),
    )
