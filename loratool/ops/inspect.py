"""What is in a checkpoint or an adapter, and where a fine-tune lives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import LowRankUpdate, ModuleKind
from loratool.algebra.factorize import resolve_spectrum
from loratool.algebra.lora_test import lora_rank
from loratool.algebra.lowrank import LowRank
from loratool.algebra.noise import BIASED
from loratool.algebra.ranks import RankRule, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.layouts.kinds import classify
from loratool.layouts.pairs import Pair, align, check_floats
from loratool.layouts.ties import find_ties
from loratool.ops.deltas import read_delta
from loratool.ops.extract_treatments import LOW_RANK_KINDS
from loratool.ops.findings import lora_summary, noise_warning
from loratool.ops.sources import open_adapter, open_model
from loratool.provenance import document

SCHEMA_VERSION = 1
SPECTRUM_VALUES = 32
"""How many leading singular values a pair's spectra resolve."""

_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The first number among a name's components: the layer."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


def family_of(name: str) -> str:
    """A parameter's name with its numbers starred: what it is called in every layer."""
    return _LAYER.sub(".*.", f".{name}.").strip(".")


# A checkpoint ---------------------------------------------------------------------------------


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


# An adapter -----------------------------------------------------------------------------------


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


# A pair ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeltaRow:
    """The change of one tensor. spectrum: None for what is no matrix to factorise.

    lora_rank, lora_tail, noise_share, near_noise: see ops.findings.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    delta_norm: float
    base_norm: float
    spectrum: Spectrum | None
    noise_share: float = 0.0
    lora_rank: int | None = None
    lora_tail: float | None = None

    @property
    def near_noise(self) -> bool:
        """Whether rounding biases the singular values low."""
        return self.noise_share >= BIASED

    @property
    def relative_change(self) -> float | None:
        """‖W − W0‖ / ‖W0‖; None where the base is zero."""
        return self.delta_norm / self.base_norm if self.base_norm else None

    def to_json(self) -> dict[str, Any]:
        spectrum = self.spectrum
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": layer_of(self.name),
            "shape": list(self.shape),
            "delta_norm": self.delta_norm,
            "base_norm": self.base_norm,
            "singular_values": spectrum.values.tolist() if spectrum else None,
            "stable_rank": spectrum.stable_rank() if spectrum else None,
            "noise_share": self.noise_share,
            "near_noise": self.near_noise,
            "lora_rank": self.lora_rank,
            "lora_tail": self.lora_tail,
        }


@dataclass(frozen=True)
class PairReport:
    """Where a fine-tune lives: the change of every tensor."""

    base: str
    tuned: str
    device: str
    rows: tuple[DeltaRow, ...]
    unchanged: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def energy(self) -> float:
        """Σ ‖D‖² over all tensors."""
        return sum(row.delta_norm**2 for row in self.rows)

    @property
    def matrices(self) -> list[DeltaRow]:
        """The changes that have a spectrum."""
        return [row for row in self.rows if row.spectrum is not None]

    def lora_summary(self) -> str | None:
        """Whether the change is a LoRA's, and of which rank; None without a matrix."""
        return lora_summary(self.matrices, f"any rank below {SPECTRUM_VALUES}")

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "pair",
            "base": self.base,
            "tuned": self.tuned,
            "device": self.device,
            "delta_norm": self.energy**0.5,
            "lora": self.lora_summary(),
            "notes": list(self.notes),
            "changed": [row.to_json() for row in self.rows],
            "unchanged": list(self.unchanged),
        }
        return document("inspect", SCHEMA_VERSION, body)


@dataclass(frozen=True)
class _DeltaJob:
    pair: Pair
    rule: RankRule
    device: torch.device

    @property
    def cost(self) -> int:
        return self.pair.base.nbytes + self.pair.tuned.nbytes


def inspect_pair(
    base: Path,
    tuned: Path,
    *,
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> PairReport:
    """Norms and leading singular values of every tensor's change.

    Raises InputError, and DisagreementError when the checkpoints do not pair up.
    """
    target = resolve_device(device)
    base_side, tuned_side = open_model(base), open_model(tuned)
    alignment = align(
        base_side.checkpoint, tuned_side.checkpoint, base_side.config, tuned_side.config
    )
    pairs: Sequence[Pair] = check_floats(list(alignment.pairs))
    rule = parse_rank_rule(str(SPECTRUM_VALUES))
    rows = (engine or Engine()).map(
        _delta_row,
        [_DeltaJob(pair, rule, target) for pair in pairs],
        cost=lambda job: job.cost,
        progress=progress or NoProgress(),
        what="comparing",
    )
    changed = [row for row in rows if row is not None]
    warning = noise_warning([row for row in changed if row.spectrum is not None])
    return PairReport(
        base.resolve().name,
        tuned.resolve().name,
        str(target),
        tuple(changed),
        tuple(pair.name for pair, row in zip(pairs, rows, strict=True) if row is None),
        (*alignment.notes, *([warning] if warning else [])),
    )


def _delta_row(job: _DeltaJob) -> DeltaRow | None:
    pair = job.pair
    delta = read_delta(pair, job.device)
    if delta is None:
        return None
    row = DeltaRow(
        pair.name,
        str(pair.kind),
        pair.base.shape,
        delta.norm,
        delta.base_norm,
        None,
        delta.noise.share_of(delta.energy),
    )
    if pair.kind not in (*LOW_RANK_KINDS, ModuleKind.CONV):
        return row
    spectrum = resolve_spectrum(delta.matrix, job.rule, key=f"0:{pair.name}")
    answer = lora_rank(spectrum, delta.noise, delta.changed_share)
    return replace(
        row,
        spectrum=spectrum,
        lora_rank=answer.rank if answer else None,
        lora_tail=answer.tail if answer else None,
    )
