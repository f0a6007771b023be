"""What is in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.layouts.kinds import classify
from loratool.layouts.ties import find_ties
from loratool.ops.inspect_level import SCHEMA_VERSION
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

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.kinds)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.kinds)

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "checkpoint",
            "name": self.name,
            "architecture": self.architecture,
            "files": self.files,
            "tied": self.tied,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "kinds": [row.to_json() for row in self.kinds],
            "tensors": list(self.tensors),
        }
        return document("inspect", SCHEMA_VERSION, body)


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """Describe a checkpoint from headers and config; no weight is read. Raises InputError."""
    model = open_model(path)
    tensors = model.checkpoint.tensors
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
    )
