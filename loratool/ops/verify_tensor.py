"""One tensor of a merged checkpoint against what it should be, and why it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate
from loratool.algebra.noise import ulp
from loratool.algebra.rounding import MERGEABLE, Rounder, round_once
from loratool.errors import LoratoolError, NonFiniteValues
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.ops.restoring import all_additive, byte_parts
from loratool.ops.rounders import rounder_of
from loratool.receipt import bit_patterns, blocks_of
from loratool.storage.tensors import MemoryTensor, TensorInfo
from loratool.storage.views import Stored

RECOGNISED_SHARE = 1e-3
"""A rounding order is recognised where it explains all but this share of the values."""
_SURE = 6.0
_WITHIN = 2e-3
_FEW = 0.01


class Status(StrEnum):
    """What verify says of one tensor."""

    EQUAL = "equal"
    ROUNDING = "within rounding"
    OFF = "off"
    CHANGED = "changed without an update"
    MISSING = "missing"
    EXTRA = "not in the base"
    SHAPE = "another shape or dtype"


class Cause(StrEnum):
    """What is behind a tensor that is off."""

    NOT_APPLIED = "not applied"
    SUBTRACTED = "subtracted"
    TWICE = "applied twice"
    SCALE = "wrong scale"
    TRANSPOSED = "transposed"
    VALUES = "some values are off"
    OTHER = "something else"


class Order(StrEnum):
    """Rounding orders that other tools merge in."""

    FLOAT32 = "summed in float32, then cast"
    DELTA = "delta cast first, then added"
    FACTORS = "factors cast first, then summed in float32"
    ALL = "factors cast first, then the delta, then added"


@dataclass(frozen=True)
class VerifyRow:
    """One tensor. Counts are of elements; ``checked`` of ``elements`` were compared.

    different: not the correctly rounded value. beyond: off by more than a unit in the last place
    of the largest of base weight, update and result. worst: the largest difference, worst_at where.
    fit: the factor of the update that fits best, ⟨W′ − W0, ΔW⟩/‖ΔW‖² where that is not spoilt by
    rounding. residual: ‖W′ − W0 − fit·ΔW‖ / ‖W′ − W0‖. order: the rounding order that explains
    the differences.
    """

    name: str
    update: str
    status: Status
    elements: int
    checked: int
    different: int = 0
    beyond: int = 0
    worst: float = 0.0
    worst_at: tuple[int, ...] = ()
    fit: float | None = None
    residual: float | None = None
    order: Order | None = None
    cause: Cause | None = None
    delta_energy: float = 0.0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }


@dataclass(frozen=True)
class VerifyJob:
    """A tensor to check. rows: only these (sorted), or None for all. scaled: of one in 8 bits."""

    name: str
    base: Stored
    merged: TensorInfo
    updates: tuple[PlacedUpdate, ...]
    update: str
    device: torch.device
    rows: tuple[int, ...] | None = None
    scaled: ScaledBy | None = None

    @property
    def cost(self) -> int:
        whole = self.merged.nbytes
        return whole if self.rows is None else whole * len(self.rows) // max(1, self.merged.rows)

    @property
    def elements(self) -> int:
        return self.merged.numel

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The row ranges to look at."""
        if self.rows is None:
            yield from blocks_of(self.base.shape)
        else:
            yield from ((row, row + 1) for row in self.rows)

    def rounder(self) -> Rounder:
        """What the updates make of the base."""
        rows = self.base.rows
        return rounder_of(self.updates, self.base, 0, rows, device=self.device, scaled=self.scaled)


def verify_tensor(job: VerifyJob) -> VerifyRow:
    """Compare a tensor with what it should be; where it differs, find out why.

    Raises NonFiniteValues naming the tensor.
    """
    try:
        return _verify_updated(job) if job.updates else _verify_unchanged(job)
    except NonFiniteValues as error:
        raise NonFiniteValues(f"{job.name}: {error.message}") from None


def _verify_updated(job: VerifyJob) -> VerifyRow:
    seen = _compare(job)
    row = VerifyRow(
        job.name,
        job.update,
        Status.EQUAL,
        job.elements,
        seen.checked,
        seen.different,
        worst=seen.worst,
        worst_at=seen.worst_at,
    )
    if not seen.different:
        return row
    if job.base.dtype.torch not in MERGEABLE or job.merged.dtype.torch not in MERGEABLE:
        return replace(row, status=Status.OFF, beyond=seen.different, cause=Cause.OTHER)
    return _diagnosed(job, row)


# Comparing ------------------------------------------------------------------------------------


@dataclass
class _Seen:
    checked: int = 0
    different: int = 0
    worst: float = 0.0
    worst_at: tuple[int, ...] = ()

    def add(self, ours: Tensor, theirs: Tensor, start: int) -> None:
        """Take in a block: what it should be and what it is, from row ``start`` on."""
        one, two = bit_patterns(ours), bit_patterns(theirs)
        self.checked += one.size
        wrong = np.flatnonzero(one != two)
        if not len(wrong):
            return
        self.different += len(wrong)
        gap = (ours.reshape(-1)[wrong].double() - theirs.reshape(-1)[wrong].double()).abs()
        gap = torch.nan_to_num(gap, nan=math.inf)
        if float(gap.max()) > self.worst or not self.worst_at:
            self.worst = float(gap.max())
            where = np.unravel_index(int(wrong[int(gap.argmax())]), theirs.shape or (1,))
            first, *rest = (int(index) for index in where)
            self.worst_at = (start + first, *rest)


def _compare(job: VerifyJob) -> _Seen:
    seen, rounder = _Seen(), job.rounder()
    dtype = job.merged.dtype.torch
    assert dtype is not None
    for start, stop in job.blocks():
        before = job.base.read_rows(start, stop)
        flat = before.reshape(stop - start, -1).to(job.device)
        ours = rounder.add_to(flat, start, dtype).values.cpu().reshape(before.shape)
        seen.add(ours, job.merged.read_rows(start, stop), start)
    return seen


def _verify_unchanged(job: VerifyJob) -> VerifyRow:
    row = VerifyRow(job.name, "", Status.EQUAL, job.elements, job.elements)
    same_dtype = job.base.dtype == job.merged.dtype
    if job.base.dtype.torch is None or not (same_dtype or job.base.dtype.is_float):
        pairs = zip(byte_parts(job.base), byte_parts(job.merged), strict=True)
        equal = same_dtype and all(one == two for one, two in pairs)
        return row if equal else replace(row, status=Status.CHANGED, different=job.elements)
    seen = _Seen()
    for start, stop in job.blocks():
        before, after = job.base.read_rows(start, stop), job.merged.read_rows(start, stop)
        seen.add(round_once(before, after.dtype), after, start)
    return replace(
        row,
        status=Status.CHANGED if seen.different else Status.EQUAL,
        checked=seen.checked,
        different=seen.different,
        worst=seen.worst,
        worst_at=seen.worst_at,
    )


# Diagnosis ------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Of one tensor, in float64. D = W′ − W0, U = ΔW, E = what D should be."""

    dd: float = 0.0
    uu: float = 0.0
    du: float = 0.0
    eu: float = 0.0
    dt: float = 0.0
    noise: float = 0.0
    beyond: int = 0
    elements: int = 0
    orders: dict[Order, int] = field(default_factory=dict)
    refuted: set[Order] = field(default_factory=set)


def _diagnosed(job: VerifyJob, row: VerifyRow) -> VerifyRow:
    sums = _sum_up(job)
    order = _recognised(sums)
    fit = _fit(sums)
    residual2 = max(0.0, sums.dd - 2 * fit * sums.du + fit * fit * sums.uu)
    row = replace(
        row,
        beyond=sums.beyond,
        order=order,
        fit=fit,
        residual=math.sqrt(residual2 / sums.dd) if sums.dd else None,
        delta_energy=sums.uu,
    )
    spread = math.sqrt(sums.noise / max(1, sums.elements) / sums.uu) if sums.uu else math.inf
    right_scale = abs(fit - 1) <= max(_WITHIN, _SURE * spread)
    if order is not None or (sums.beyond == 0 and right_scale):
        return replace(row, status=Status.ROUNDING)
    return replace(row, status=Status.OFF, cause=_cause(sums, fit, residual2, right_scale))


def _sum_up(job: VerifyJob) -> _Sums:
    sums, rounder = _Sums(), job.rounder()
    delta_of, turned, orders = _delta(job), _turned(job), _orders(job)
    sums.orders = dict.fromkeys(orders, 0)
    dtype = job.merged.dtype.torch
    assert dtype is not None
    for start, stop in job.blocks():
        before = job.base.read_rows(start, stop).reshape(stop - start, -1)
        after = job.merged.read_rows(start, stop).reshape(stop - start, -1)
        ours = rounder.add_to(before.to(job.device), start, dtype).values.cpu()
        u = delta_of(before, start)
        d = after.double() - before.double()
        e = ours.double() - before.double()
        sums.dd += float(d.square().sum())
        sums.uu += float(u.square().sum())
        sums.du += float((d * u).sum())
        sums.eu += float((e * u).sum())
        sums.elements += d.numel()
        largest = torch.maximum(torch.maximum(before.abs().float(), u.abs().float()), after.abs())
        unit = ulp(largest.to(dtype)).double()
        sums.noise += float(unit.square().sum()) / 12
        sums.beyond += int(((after.double() - ours.double()).abs() > unit).sum())
        if turned is not None:
            sums.dt += float((d * turned(before, start)).sum())
        for order, merge in orders.items():
            theirs = merge(before, start)
            wrong = bit_patterns(theirs) != bit_patterns(after)
            sums.orders[order] += int(np.count_nonzero(wrong))
            if bool(((after.double() - theirs.double()).abs() > unit).any()):
                sums.refuted.add(order)
    return sums


def _recognised(sums: _Sums) -> Order | None:
    left = [order for order in sums.orders if order not in sums.refuted]
    if not left:
        return None
    order = min(left, key=lambda one: sums.orders[one])
    most = max(RECOGNISED_SHARE * sums.elements, min(3, sums.elements / 100))
    return order if sums.orders[order] <= most else None


def _fit(sums: _Sums) -> float:
    """The factor of the update. Where rounding swallows part of it, as it should, that is no
    reason to call the scale wrong: the correct merge's own loss is divided out."""
    if not sums.uu:
        return 0.0
    if sums.eu > 0.05 * sums.uu:
        return sums.du / sums.eu
    return sums.du / sums.uu


def _cause(sums: _Sums, fit: float, residual2: float, right_scale: bool) -> Cause:
    if not sums.dd:
        return Cause.NOT_APPLIED
    explained = 4 * sums.noise + 1e-8 * sums.dd
    if residual2 <= explained:
        for factor, cause in (
            (0.0, Cause.NOT_APPLIED),
            (-1.0, Cause.SUBTRACTED),
            (2.0, Cause.TWICE),
        ):
            if abs(fit - factor) < 0.02:
                return cause
        return Cause.VALUES if right_scale else Cause.SCALE
    if sums.beyond <= _FEW * sums.elements and abs(fit - 1) < 0.1:
        return Cause.VALUES
    if sums.uu and sums.dt:
        turned = sums.dt / sums.uu
        if sums.dd - sums.dt * turned <= explained and abs(turned - 1) < 0.05:
            return Cause.TRANSPOSED
    return Cause.OTHER


Delta = Callable[[Tensor, int], Tensor]


def delta_of(base: Stored, updates: Sequence[PlacedUpdate], device: torch.device) -> Delta:
    """ΔW of rows (given as the base has them, and the first one's number): float64, to float32
    precision."""
    rounder = rounder_of(updates, base, 0, base.rows, device=device)
    additive = all_additive(updates)

    def delta(before: Tensor, start: int) -> Tensor:
        w0 = before if before.dtype in MERGEABLE else before.float()
        origin = torch.zeros_like(w0) if additive else w0
        moved = rounder.add_to(origin.to(device), start, torch.float32).values.cpu()
        return moved.double() - origin.double()

    return delta


def _delta(job: VerifyJob, updates: Sequence[PlacedUpdate] | None = None) -> Delta:
    return delta_of(job.base, job.updates if updates is None else updates, job.device)


def _turned(job: VerifyJob) -> Delta | None:
    """The updates the wrong way round, where the tensor is square."""
    shape = job.base.shape
    if len(shape) != 2 or shape[0] != shape[1] or not _low_rank(job.updates):
        return None
    return _delta(job, [replace(one, transposed=not one.transposed) for one in job.updates])


def _low_rank(updates: Sequence[PlacedUpdate]) -> bool:
    """Whether all are plain low-rank updates of the whole tensor."""
    return all(
        isinstance(one.update, LowRankUpdate) and one.places is None and one.member is None
        for one in updates
    )


def _orders(job: VerifyJob) -> dict[Order, Delta]:
    """Merges as other tools do them, for 16-bit results."""
    dtype = job.merged.dtype.torch
    assert dtype is not None
    if dtype == torch.float32 or not all_additive(job.updates):
        return {}
    delta = _delta(job)
    orders = {Order.FLOAT32: _summed(delta, dtype), Order.DELTA: _cast_first(delta, dtype)}
    if _low_rank(job.updates):
        try:
            cast = _delta(job, [_with_factors_in(one, dtype) for one in job.updates])
        except LoratoolError:  # factors beyond the dtype's range: nobody merged like that
            return orders
        orders |= {Order.FACTORS: _summed(cast, dtype), Order.ALL: _cast_first(cast, dtype)}
    return orders


def _summed(delta: Delta, dtype: torch.dtype) -> Delta:
    return lambda w0, start: (w0.float() + delta(w0, start).float()).to(dtype)


def _cast_first(delta: Delta, dtype: torch.dtype) -> Delta:
    return lambda w0, start: (w0.float() + delta(w0, start).float().to(dtype).float()).to(dtype)


def _with_factors_in(placed: PlacedUpdate, dtype: torch.dtype) -> PlacedUpdate:
    update = placed.update
    assert isinstance(update, LowRankUpdate)
    b, a = (MemoryTensor(one.read().to(dtype)) for one in (update.b, update.a))
    return replace(placed, update=replace(update, b=b, a=a))
