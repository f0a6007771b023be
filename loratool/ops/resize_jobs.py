"""The work on one update of an adapter that is resized, as a job that any worker can run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loratool.adapter import LowRankUpdate
from loratool.algebra.ranks import RankRule
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.truncation import rounding, stored_error, truncate, wanted_rank
from loratool.ops.adapter_folder import in_scale, load_update, park_update, stored_value
from loratool.ops.combine_report import UpdateRow
from loratool.profiles.padding import padded
from loratool.storage.dtypes import DType


@dataclass(frozen=True)
class ResizeJob:
    """One update and the rule for its rank.

    scale: that of the result. balance: make new factors even where the rank stays.
    """

    index: int
    name: str
    label: str
    update: LowRankUpdate
    rule: RankRule
    scale: float
    balance: bool
    dtype: DType
    device: torch.device
    seed: int
    scratch: Path | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) as the factors have it."""
        rows, columns = self.update.shape
        return (columns, rows) if self.update.is_embedding else (rows, columns)

    @property
    def rank_at_most(self) -> int:
        if self.rule.kind.name == "fixed":
            return self.rule.first_guess(self.shape)
        return self.rule.limits.apply(self.update.rank, self.shape)

    @property
    def cost(self) -> int:
        """Bytes to read."""
        return self.update.rank * sum(self.shape) * self.update.a.dtype.bits // 8


@dataclass(frozen=True)
class ResizeResult:
    """An update's row, and the update where anything is left of it."""

    row: UpdateRow
    update: LowRankUpdate | None


def resize_update(job: ResizeJob) -> ResizeResult:
    """Cut or pad one update, round to the stored dtype, measure what that misses, and park.

    Where nothing is lost by it, the factors stay as they are.
    """
    value = load_update(job.label, job.update, job.device)
    wanted = 0

    def choose(spectrum: Spectrum) -> int:
        nonlocal wanted
        wanted = wanted_rank(job.rule, spectrum)
        return wanted

    cut = truncate(value, choose)
    norm = cut.spectrum.norm
    row = UpdateRow(job.name, job.shape, (value.rank,), (1.0,), 0, norm, 1.0, "core SVD")
    if not wanted or not cut.value.rank:
        return ResizeResult(replace(row, relative_error=1.0 if norm else 0.0), None)
    if wanted >= value.rank and not job.balance and job.scale == value.scale:
        kept, how = value, "factors kept"
    else:
        kept, how = in_scale(cut.value, job.scale), "core SVD"
    stored = stored_value(job.name, kept, job.dtype)
    off = rounding(kept, stored)
    error = off.norm() if kept is value else stored_error(value, cut, off)
    assert job.scratch is not None
    update = park_update(job.scratch / f"{job.index}.raw", stored, job.update)
    rank = max(wanted, stored.rank)
    row = replace(row, rank=rank, relative_error=error / norm, how=how)
    return ResizeResult(row, padded(update, rank, f"{job.seed}:{job.name}"))


def spectrum_of(job: ResizeJob) -> Spectrum:
    """All its numerically nonzero singular values."""
    return truncate(load_update(job.label, job.update, job.device), lambda _: 0).spectrum
