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
from loratool.layouts.patterns import select
from loratool.layouts.scales import refuse_scaled
from loratool.ops.deltas import measure_delta, read_delta
from loratool.ops.extract_treatments import LOW_RANK_KINDS
from loratool.ops.findings import lora_summary, rounding_notes
from loratool.ops.inspect_level import SCHEMA_VERSION, Level
from loratool.ops.sources import open_model
from loratool.ops.spectra import (
    SPECTRUM_VALUES,
    factor_bytes,
    rank_for,
    ranks_by_share,
    shape_figures,
    sizes_by_share,
)
from loratool.plural import counted
from loratool.provenance import document


@dataclass(frozen=True)
class DeltaRow:
    """The change of one tensor. spectrum: None for what is no matrix to factorise, or at level
    values. changed_share: share of entries that differ. bits: of a stored value.

    lora_rank, lora_least, lora_tail, noise_share, near_noise: see ops.findings.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    delta_norm: float
    base_norm: float
    spectrum: Spectrum | None
    noise_share: float = 0.0
    lora_rank: int | None = None
    lora_least: int | None = None
    lora_tail: float | None = None
    changed_share: float = 1.0
    bits: int = 16

    def rank_for(self, share: float) -> int | None:
        """Smallest rank that keeps this share of ‖D‖²; None where it was not resolved."""
        return rank_for(self.spectrum, share)

    def values_for(self, rank: int) -> int:
        """Values of the two factors of this rank."""
        return rank * sum(self.spectrum.shape) if self.spectrum is not None else 0

    @property
    def above_noise(self) -> int | None:
        """Singular values above the noise floor; None where those resolved all are."""
        return parse_rank_rule("auto")(self.spectrum) if self.spectrum is not None else None

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
        complete = spectrum is not None and spectrum.is_complete
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": layer_of(self.name),
            "shape": list(self.shape),
            "delta_norm": self.delta_norm,
            "base_norm": self.base_norm,
            "changed_share": self.changed_share,
            "singular_values": spectrum.values.tolist() if spectrum else None,
            **shape_figures(spectrum, complete=complete),
            "noise_floor": spectrum.noise_floor if spectrum else None,
            "above_noise": self.above_noise,
            "gavish_donoho": parse_rank_rule("gavish-donoho")(spectrum)
            if complete and spectrum
            else None,
            "rank_for": ranks_by_share(spectrum),
            "noise_share": self.noise_share,
            "near_noise": self.near_noise,
            "lora_rank": self.lora_rank,
            "lora_least": self.lora_least,
            "lora_tail": self.lora_tail,
        }


@dataclass(frozen=True)
class Paired:
    """Two tensors of one name. added_rows: tokens that tuned has beyond base's."""

    name: str
    kind: str
    base_dtype: str
    tuned_dtype: str
    added_rows: int


@dataclass(frozen=True)
class PairReport:
    """Where a fine-tune lives: the change of every tensor."""

    base: str
    tuned: str
    device: str
    rows: tuple[DeltaRow, ...]
    unchanged: tuple[str, ...]
    notes: tuple[str, ...]
    level: Level = Level.SPECTRA
    paired: tuple[Paired, ...] = ()

    def adapter_bytes(self, share: float) -> tuple[int, bool]:
        """Size of an adapter that keeps this share of each matrix's energy, and whether it is only
        a lower bound, because some rank lies beyond what was resolved.
        """
        return factor_bytes(self._spectra(), share)

    def _spectra(self) -> list[tuple[Spectrum, int]]:
        return [(row.spectrum, row.bits) for row in self.rows if row.spectrum is not None]

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
        looked_at = f"any rank below {SPECTRUM_VALUES}"
        if any(min(row.spectrum.shape) <= SPECTRUM_VALUES for row in self.matrices if row.spectrum):
            looked_at += " and below the matrix's smaller side"
        others = len(self.rows) - len(self.matrices)
        return lora_summary(self.matrices, looked_at, others)

    def to_json(self) -> dict[str, Any]:
        body = {
            "what": "pair",
            "level": str(self.level),
            "base": self.base,
            "tuned": self.tuned,
            "device": self.device,
            "delta_norm": self.energy**0.5,
            "lora": self.lora_summary(),
            "notes": list(self.notes),
            "adapter_bytes": sizes_by_share(self._spectra()),
            "tensors": [vars(row) for row in self.paired],
            "changed": [row.to_json() for row in self.rows],
            "unchanged": list(self.unchanged),
        }
        return document("inspect", SCHEMA_VERSION, body)


@dataclass(frozen=True)
class _DeltaJob:
    pair: Pair
    rule: RankRule | None
    device: torch.device
    exact: bool = False

    @property
    def cost(self) -> int:
        return self.pair.base.nbytes + self.pair.tuned.nbytes


def inspect_pair(
    base: Path,
    tuned: Path,
    level: Level = Level.SPECTRA,
    *,
    only: Sequence[str] = (),
    exact: bool = False,
    device: str = "auto",
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> PairReport:
    """What differs between two checkpoints: at level headers in dtypes and tokens; at level values
    the norms of every tensor's change; at level spectra also its leading singular values.

    only: globs over names. exact: every singular value, by a full decomposition. Raises InputError,
    NothingMatches, and DisagreementError when the checkpoints do not pair up.
    """
    target = resolve_device(device)
    base_side, tuned_side = open_model(base), open_model(tuned)
    alignment = align(
        base_side.checkpoint, tuned_side.checkpoint, base_side.config, tuned_side.config
    )
    chosen = select([pair.name for pair in alignment.pairs], only, ())
    pairs: Sequence[Pair] = [pair for pair in alignment.pairs if pair.name in chosen]
    rows: list[DeltaRow | None] = []
    passed_over = _passed_over(pairs, alignment.ignored)
    if level is not Level.HEADERS:
        tied = {name: main for name, main in alignment.repeats.items() if {name, main} <= chosen}
        pairs = [pair for pair in pairs if pair.name not in tied]
        passed_over += [f"{name} is tied to {main}: counted once" for name, main in tied.items()]
        refuse_scaled("base", base_side.checkpoint.tensors, [pair.base for pair in pairs])
        refuse_scaled("tuned", tuned_side.checkpoint.tensors, [pair.whole for pair in pairs])
        pairs = check_floats(list(pairs))
        rule = parse_rank_rule("full" if exact else str(SPECTRUM_VALUES))
        asked = rule if level is Level.SPECTRA else None
        rows = (engine or Engine()).map(
            _delta_row,
            [_DeltaJob(pair, asked, target, exact) for pair in pairs],
            cost=lambda job: job.cost,
            progress=progress or NoProgress(),
            what="comparing",
        )
    changed = [row for row in rows if row is not None]
    said = rounding_notes([row for row in changed if row.spectrum is not None])
    return PairReport(
        base.resolve().name,
        tuned.resolve().name,
        str(target),
        tuple(changed),
        tuple(pair.name for pair, row in zip(pairs, rows, strict=False) if row is None),
        (*alignment.notes, *passed_over, *said),
        level,
        tuple(_paired(pair) for pair in pairs),
    )


def _passed_over(pairs: Sequence[Pair], ignored: Sequence[str]) -> list[str]:
    """What a pair's changes do not speak of."""
    whole = [pair.name for pair in pairs if not pair.base.dtype.is_float]
    return [
        f"{counted(len(names), *what)} not compared "
        f"({', '.join(names[:3])}{', …' if names[3:] else ''})"
        for names, what in (
            (whole, ("tensor of integers", "tensors of integers")),
            (ignored, ("buffer on one side", "buffers on one side")),
        )
        if names
    ]


def _paired(pair: Pair) -> Paired:
    dtypes = pair.base.dtype.name, pair.tuned.dtype.name
    return Paired(pair.name, str(pair.kind), *dtypes, pair.added_rows)


def _delta_row(job: _DeltaJob) -> DeltaRow | None:
    pair, rule = job.pair, job.rule
    has_spectrum = rule is not None and pair.kind in (*LOW_RANK_KINDS, ModuleKind.CONV)
    delta = (
        read_delta(pair, job.device, rough=not job.exact)
        if has_spectrum
        else measure_delta(pair, job.device)
    )
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
        changed_share=delta.changed_share,
        bits=pair.tuned.dtype.bits,
    )
    if rule is None or not has_spectrum:
        return row
    spectrum = resolve_spectrum(
        delta.matrix,
        rule,
        key=f"0:{pair.name}",
        exact=job.exact,
        noise_floor=delta.noise.threshold,
        energy=delta.energy,
        rough=delta.rough,
    )
    answer = lora_rank(spectrum, delta.noise, delta.changed_share)
    return replace(
        row,
        spectrum=spectrum,
        lora_rank=answer.rank if answer else None,
        lora_least=answer.least if answer else None,
        lora_tail=answer.tail if answer else None,
    )
