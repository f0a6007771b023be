"""Where a fine-tune lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import ModuleKind
from loratool.algebra.factorize import resolve_spectrum
from loratool.algebra.lora_test import lora_rank
from loratool.algebra.noise import BIASED
from loratool.algebra.ranks import RankRule, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.layouts.families import layer_of
from loratool.layouts.pairs import Pair, align, check_floats
from loratool.ops.deltas import read_delta
from loratool.ops.extract_treatments import LOW_RANK_KINDS
from loratool.ops.findings import lora_summary, noise_warning
from loratool.ops.inspect_level import SCHEMA_VERSION
from loratool.ops.sources import open_model
from loratool.provenance import document

SPECTRUM_VALUES = 32
"""How many leading singular values a pair's spectra resolve."""


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
