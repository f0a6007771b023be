"""Making one module's factors to train from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate, ModuleKind
from loratool.algebra.blocks import all_finite
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import residual_norm
from loratool.errors import NonFiniteValues
from loratool.formats.loralib import merged_linear
from loratool.inits.method import Init, Start
from loratool.inits.registry import find_init
from loratool.layouts.pairs import Pair
from loratool.layouts.qkv_parts import PARTS
from loratool.ops.adapter_folder import park_factors, stored_value
from loratool.storage.dtypes import DType
from loratool.storage.writing import park


@dataclass(frozen=True)
class InitJob:
    """One module's factors to make. parts: which of q, k and v of a fused matrix get factors,
    each of the shape and rank of ``start``; empty where the module is adapted as a whole."""

    index: int
    pair: Pair
    parts: tuple[bool, ...]
    method: str
    start: Start
    dtype: DType
    device: torch.device
    scratch: Path | None = None

    @property
    def init(self) -> Init:
        return find_init(self.method)

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return (sum(self.parts) or 1) * self.start.rank * sum(self.start.shape)

    @property
    def cost(self) -> int:
        """Bytes to read, or to make."""
        if self.init.changes_base:
            return self.pair.base.nbytes
        return self.parameters * 4


@dataclass(frozen=True)
class InitRow:
    """One adapted module. shape: of its weight as stored. rank: of each part where there are
    parts. energy_kept: share of ‖W‖² in its s·B·A, None where B is zero."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    parameters: int
    parts: tuple[str, ...]
    energy_kept: float | None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "parts": list(self.parts)}


def start_module(job: InitJob) -> tuple[InitRow, LowRankUpdate]:
    """One module's factors, parked on disk."""
    kept = None
    if job.parts:
        update = _parts_at_zero(job)
    elif job.init.from_shape is not None:
        update = _at_zero(job)
    else:
        update, kept = _from_weight(job)
    rank = job.start.rank if job.parts else update.rank
    row = InitRow(
        job.pair.name,
        str(job.pair.kind),
        tuple(job.pair.base.shape),
        rank,
        job.parameters // job.start.rank * rank,
        tuple(part for part, adapted in zip(PARTS, job.parts, strict=False) if adapted),
        kept,
    )
    return row, update


def _at_zero(job: InitJob) -> LowRankUpdate:
    """An embedding's random factor is the one on the side of the vectors, as PEFT has it."""
    assert job.init.from_shape is not None
    is_embedding = job.pair.kind is ModuleKind.EMBEDDING
    seen = replace(job.start, shape=job.start.shape[::-1]) if is_embedding else job.start
    value = job.init.from_shape(seen)
    stored = stored_value(job.pair.name, value.T if is_embedding else value, job.dtype)
    kernel = job.pair.base.shape[1:] if job.pair.kind is ModuleKind.CONV else ()
    return park_factors(_parked_at(job), stored, kernel, is_embedding=is_embedding)


def _parts_at_zero(job: InitJob) -> LowRankUpdate:
    """Each part's factors as of a module of its own, one under the other."""
    assert job.init.from_shape is not None
    made = [
        stored_value(
            job.pair.name,
            job.init.from_shape(replace(job.start, key=f"{job.start.key}:{part}")),
            job.dtype,
        )
        for part, adapted in zip(PARTS, job.parts, strict=True)
        if adapted
    ]
    b, a = torch.cat([value.b for value in made]), torch.cat([value.a for value in made])
    parked = park(_parked_at(job), {"b": b, "a": a})
    alpha = job.start.scale * job.start.rank
    return merged_linear(parked["b"], parked["a"], alpha, job.parts)


def _from_weight(job: InitJob) -> tuple[LowRankUpdate, float | None]:
    assert job.init.from_weight is not None
    weight = _weight(job)
    value = job.init.from_weight(weight, job.start)
    stored = stored_value(job.pair.name, value, job.dtype)
    energy = sum_of_squares(weight)
    missed = residual_norm(weight, stored) ** 2
    kept = 1 - missed / energy if energy else None
    return park_factors(_parked_at(job), stored, (), is_embedding=False), kept


def _parked_at(job: InitJob) -> Path:
    assert job.scratch is not None
    return job.scratch / f"{job.index}.raw"


def _weight(job: InitJob) -> Tensor:
    weight = job.pair.base.read().to(job.device).float()
    if not all_finite(weight):
        raise NonFiniteValues(f"{job.pair.name}: holds NaN or infinity")
    return weight.T if job.pair.kind is ModuleKind.CONV1D else weight
