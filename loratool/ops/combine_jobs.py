"""The work on one weight of a combination, as a job that any worker can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate
from loratool.algebra.factorize_rows import factorize_rows, residual_energy
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankRule
from loratool.algebra.row_blocks import HELD_BYTES, RowBlocks
from loratool.algebra.truncation import rounding, stored_error, truncate, wanted_rank
from loratool.combining.geometry import gram
from loratool.combining.method import Space, Updates, Value
from loratool.combining.registry import find_method
from loratool.ops.adapter_folder import in_scale, load_update, park_update, stored_value
from loratool.ops.combine_report import UpdateRow
from loratool.storage.dtypes import DType


@dataclass(frozen=True)
class CombineJob:
    """One weight: every adapter's update of it (None where it has none), and what to make of them.

    rule: None where the method keeps the rank that comes out. one_scale: it is stored together with
    others that have the same scale.
    """

    index: int
    name: str
    labels: tuple[str, ...]
    updates: tuple[LowRankUpdate | None, ...]
    weights: tuple[float, ...]
    method: str
    parameters: Mapping[str, Value]
    rule: RankRule | None
    dtype: DType
    device: torch.device
    seed: int
    one_scale: bool
    scratch: Path | None = None

    @property
    def like(self) -> LowRankUpdate:
        """An update that shows the module's shape and kind."""
        return next(update for update in self.updates if update is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) as the factors have it."""
        update = self.like
        rows, columns = update.shape
        return (columns, rows) if update.is_embedding else (rows, columns)

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(0 if update is None else update.rank for update in self.updates)

    @property
    def rank_at_most(self) -> int:
        """The rank of the result before values are known."""
        most = min(sum(self.ranks), *self.shape)
        if self.rule is None:
            return sum(self.ranks)
        dense = find_method(self.method).space is Space.DENSE
        return self.rule.likely(self.shape) if dense else min(most, self._asked(most))

    def _asked(self, most: int) -> int:
        assert self.rule is not None
        return int(self.rule.value) if self.rule.kind.name == "fixed" else most

    @property
    def cost(self) -> int:
        """Bytes to read."""
        return sum(u.rank * sum(self.shape) * u.a.dtype.bits // 8 for u in self.updates if u)

    @property
    def memory_bytes(self) -> int:
        """Working memory, roughly: the stacked factors in float64 a few times, and what is held."""
        factors = 6 * 8 * sum(self.ranks) * sum(self.shape)
        if find_method(self.method).space is not Space.DENSE:
            return factors
        return factors + min(4 * self.shape[0] * self.shape[1], HELD_BYTES)


@dataclass(frozen=True)
class CombineResult:
    """A weight's row, its update where it is not zero, and the inputs' inner products (N, N)."""

    row: UpdateRow
    update: LowRankUpdate | None
    products: Tensor


@dataclass(frozen=True)
class _Outcome:
    """stored: None where the result is zero. error: ‖exact − stored‖_F. norm: of the exact one."""

    stored: LowRank | None
    norm: float
    error: float
    how: str


def combine_weight(job: CombineJob) -> CombineResult:
    """Combine, cut, round to the stored dtype, measure what that misses, and park."""
    updates = Updates(job.name, _loaded(job), job.weights, job.seed)
    products = gram(updates.updates)
    method = find_method(job.method)
    combined = method(updates, job.parameters)
    outcome = (
        _store_low_rank(job, combined)
        if isinstance(combined, LowRank)
        else _store_dense(job, combined.held())
    )
    stored = outcome.stored
    row = UpdateRow(
        job.name,
        job.shape,
        job.ranks,
        job.weights,
        0 if stored is None else stored.rank,
        outcome.norm,
        outcome.error / outcome.norm if outcome.norm else 0.0,
        outcome.how,
    )
    if stored is None:
        return CombineResult(row, None, products)
    assert job.scratch is not None
    update = park_update(job.scratch / f"{job.index}.raw", stored, job.like)
    return CombineResult(row, update, products)


def _loaded(job: CombineJob) -> tuple[LowRank, ...]:
    rows, columns = job.shape
    b = torch.zeros(rows, 0, dtype=torch.float32, device=job.device)
    nothing = LowRank(b, b.new_zeros(0, columns))
    return tuple(
        nothing if update is None else load_update(label, update, job.device)
        for label, update in zip(job.labels, job.updates, strict=True)
    )


def _store_low_rank(job: CombineJob, exact: LowRank) -> _Outcome:
    if job.rule is None:
        norm = exact.norm()
        if not norm or not exact.rank:
            return _Outcome(None, norm, norm, "as it comes")
        kept, stored = _stored(job, exact)
        return _Outcome(stored, norm, rounding(kept, stored).norm(), "as it comes")
    cut = truncate(exact, partial(wanted_rank, job.rule))
    norm = cut.spectrum.norm
    if not cut.value.rank:
        return _Outcome(None, norm, norm, "core SVD")
    kept, stored = _stored(job, cut.value)
    return _Outcome(stored, norm, stored_error(exact, cut, rounding(kept, stored)), "core SVD")


def _stored(job: CombineJob, kept: LowRank) -> tuple[LowRank, LowRank]:
    """The value in the scale that it is stored with, and as stored."""
    if job.one_scale:
        kept = in_scale(kept, 1.0)
    return kept, stored_value(job.name, kept, job.dtype)


def _store_dense(job: CombineJob, exact: RowBlocks) -> _Outcome:
    assert job.rule is not None
    factors = factorize_rows(exact, job.rule, key=f"{job.seed}:{job.name}")
    norm = factors.spectrum.norm
    if not factors.value.rank:
        return _Outcome(None, norm, norm, factors.method)
    stored = stored_value(job.name, factors.value, job.dtype)
    return _Outcome(stored, norm, residual_energy(exact, stored) ** 0.5, factors.method)
