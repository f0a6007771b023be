"""Why a merged tensor is not what it should be: another rounding, scale, side or update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate
from loratool.algebra.certified_scaled import EIGHT_BITS, spacing
from loratool.algebra.noise import ulp
from loratool.algebra.rounding import MERGEABLE
from loratool.errors import LoratoolError
from loratool.layouts.placing import PlacedUpdate
from loratool.ops.restoring import all_additive
from loratool.ops.rounders import float32_errors, rounder_of
from loratool.ops.verify_row import AdapterFit, Cause, Order, Status, VerifyJob, VerifyRow
from loratool.receipt import bit_patterns
from loratool.storage.tensors import MemoryTensor
from loratool.storage.views import Stored

RECOGNISED_SHARE = 1e-3
"""A rounding order is recognised where it explains all but this share of the values."""
_SURE = 6.0
_WITHIN = 2e-3
_FEW = 0.01
_NEAR = 0.02
_KEPT = 0.05
"""Of an update: where rounding leaves less, nothing is divided by what it leaves."""
_ALIKE = 1e-6
"""Below this smallest eigenvalue of their cosines, updates cannot be told apart."""


def can_be_diagnosed(job: VerifyJob) -> bool:
    """Whether differences in these dtypes can be measured against the update."""
    if job.scaled is not None and not all_additive(job.updates):
        return False
    known = (*MERGEABLE, *EIGHT_BITS)
    return job.base.dtype.torch in known and job.merged.dtype.torch in known


@dataclass
class _Sums:
    """Of one tensor, in float64. D = W′ − W0, U = ΔW, E = what D should be.

    parts: the adapters, counted from 0, if what each adds is known. gram, d_parts, e_parts: where
    there are several, the inner products of what each adds with that of the others, with D and E.
    """

    parts: tuple[int, ...]
    gram: np.ndarray
    d_parts: np.ndarray
    e_parts: np.ndarray
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

    @staticmethod
    def of(updates: Sequence[PlacedUpdate]) -> _Sums:
        parts = tuple(dict.fromkeys(update.adapter for update in updates))
        if len(parts) > 1 and not all_additive(updates):
            parts = ()
        count = len(parts) if len(parts) > 1 else 0
        return _Sums(parts, np.zeros((count, count)), np.zeros(count), np.zeros(count))


def diagnosed(job: VerifyJob, row: VerifyRow) -> VerifyRow:
    """The row of a tensor that differs, with what is behind it."""
    sums = _sum_up(job)
    if not math.isfinite(sums.dd):
        where = "holds NaN or infinity"
        return replace(row, status=Status.OFF, beyond=sums.beyond, cause=Cause.OTHER, detail=where)
    order = _recognised(sums)
    fit, fits = _fit(sums), _fits(sums)
    residual2 = max(0.0, sums.dd - 2 * fit * sums.du + fit * fit * sums.uu)
    if len(fits) > 1:
        found = np.array([one.fit for one in fits])
        residual2 = max(0.0, sums.dd - 2 * found @ sums.d_parts + found @ sums.gram @ found)
    row = replace(
        row,
        beyond=sums.beyond,
        order=order,
        fit=fit,
        fits=fits,
        residual=math.sqrt(residual2 / sums.dd) if sums.dd else None,
        delta_energy=sums.uu,
    )
    right_scale = all(
        abs(one - 1) <= max(_WITHIN, _SURE * _spread(sums, energy))
        for one, energy in [(fit, sums.uu), *((one.fit, one.energy) for one in fits)]
    )
    if order is not None or (sums.beyond == 0 and right_scale):
        return replace(row, status=Status.ROUNDING)
    return replace(row, status=Status.OFF, cause=_cause(sums, fit, fits, residual2, right_scale))


def _spread(sums: _Sums, energy: float) -> float:
    """How far rounding alone moves a fitted factor."""
    return math.sqrt(sums.noise / max(1, sums.elements) / energy) if energy else math.inf


def _sum_up(job: VerifyJob) -> _Sums:
    sums, rounder = _Sums.of(job.updates), job.rounder()
    delta_of, turned, orders = _delta(job), _turned(job), _orders(job)
    alone = [_delta(job, one) for one in _by_adapter(job.updates)[: len(sums.gram)]]
    sums.orders = dict.fromkeys(orders, 0)
    dtype = job.merged.dtype.torch
    assert dtype is not None
    # a unit of the result is more than 16 bits' arithmetic in float32 can miss, but not float32's
    errors = float32_errors(job.updates, job.base) if dtype == torch.float32 else None
    for start, stop in job.blocks():
        before = job.base.read_rows(start, stop).reshape(stop - start, -1)
        after = job.merged.read_rows(start, stop).reshape(stop - start, -1)
        ours = rounder.add_to(before.to(job.device), start, dtype).values.cpu()
        u = delta_of(before, start)
        scale = (
            job.scaled.rows(start, stop) if job.scaled else torch.ones(1, 1, dtype=torch.float64)
        )
        d = (after.double() - before.double()) * scale
        e = (ours.double() - before.double()) * scale
        sums.dd += float(d.square().sum())
        sums.uu += float(u.square().sum())
        sums.du += float((d * u).sum())
        sums.eu += float((e * u).sum())
        sums.elements += d.numel()
        each = [delta(before, start) for delta in alone]
        for i, mine in enumerate(each):
            sums.d_parts[i] += float((d * mine).sum())
            sums.e_parts[i] += float((e * mine).sum())
            sums.gram[i] += [float((mine * other).sum()) for other in each]
        unit = _unit(before, after, u, scale)
        if errors is not None:
            unit = unit + errors(before, start)
        sums.noise += float(unit.square().sum()) / 12
        sums.beyond += int(((after.double() - ours.double()).abs() * scale > unit).sum())
        if turned is not None:
            sums.dt += float((d * turned(before, start)).sum())
        for order, merge in orders.items():
            theirs = merge(before, start)
            wrong = bit_patterns(theirs) != bit_patterns(after)
            sums.orders[order] += int(np.count_nonzero(wrong))
            if bool(((after.double() - theirs.double()).abs() > unit).any()):
                sums.refuted.add(order)
    return sums


def _unit(before: Tensor, after: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """A unit in the last place of the largest of base weight, update and result, in float64."""
    if after.dtype in EIGHT_BITS:
        largest = torch.maximum(before.double().abs(), after.double().abs())
        return spacing(torch.maximum(largest, u.abs() / scale), after.dtype) * scale
    largest = torch.maximum(torch.maximum(before.abs().float(), u.abs().float()), after.abs())
    return ulp(largest.to(after.dtype)).double()


def _recognised(sums: _Sums) -> Order | None:
    left = [order for order in sums.orders if order not in sums.refuted]
    if not left:
        return None
    order = min(left, key=lambda one: sums.orders[one])
    most = max(RECOGNISED_SHARE * sums.elements, min(3, sums.elements / 100))
    return order if sums.orders[order] <= most else None


def _fits(sums: _Sums) -> tuple[AdapterFit, ...]:
    """The factor of each adapter, by least squares over all of them; none where their updates are
    too alike to be told apart."""
    if len(sums.parts) == 1:
        return (AdapterFit(sums.parts[0], _fit(sums), sums.uu),)
    size = np.sqrt(np.diagonal(sums.gram))
    if not len(size) or not size.all():
        return ()
    cosines = sums.gram / np.outer(size, size)
    if np.linalg.eigvalsh(cosines)[0] < _ALIKE:
        return ()
    found = np.linalg.solve(cosines, sums.d_parts / size) / size
    due = np.linalg.solve(cosines, sums.e_parts / size) / size
    kept = np.where(due > _KEPT, due, 1.0)
    return tuple(
        AdapterFit(part, float(factor), float(energy))
        for part, factor, energy in zip(sums.parts, found / kept, size**2, strict=True)
    )


def _fit(sums: _Sums) -> float:
    """The factor of the update. Where rounding swallows part of it, as it should, that is no
    reason to call the scale wrong: the correct merge's own loss is divided out."""
    if not sums.uu:
        return 0.0
    if sums.eu > _KEPT * sums.uu:
        return sums.du / sums.eu
    return sums.du / sums.uu


def _cause(
    sums: _Sums, fit: float, fits: Sequence[AdapterFit], residual2: float, right_scale: bool
) -> Cause:
    if not sums.dd:
        return Cause.NOT_APPLIED
    explained = 4 * sums.noise + 1e-8 * sums.dd
    if residual2 <= explained:
        factors = [one.fit for one in fits] or [fit]
        for factor, cause in (
            (0.0, Cause.NOT_APPLIED),
            (-1.0, Cause.SUBTRACTED),
            (2.0, Cause.TWICE),
        ):
            if all(abs(one - factor) < _NEAR for one in factors):
                return cause
        near = [min(abs(one), abs(one - 1)) < _NEAR for one in factors]
        if all(near) and any(abs(one) < _NEAR for one in factors) and not right_scale:
            return Cause.PART
        many = sums.beyond > _FEW * sums.elements and any(abs(one - 1) > 0.1 for one in factors)
        return Cause.VALUES if right_scale and not many else Cause.SCALE
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
    if dtype not in (torch.bfloat16, torch.float16) or not all_additive(job.updates):
        return {}
    delta = _delta(job)
    orders = {Order.FLOAT32: _summed(delta, dtype), Order.DELTA: _cast_first(delta, dtype)}
    steps = _by_adapter(job.updates)
    if len(steps) > 1:
        orders[Order.STEPS] = _in_turn([_summed(_delta(job, one), dtype) for one in steps])
    if _low_rank(job.updates):
        try:
            updates = [_with_factors_in(one, dtype) for one in job.updates]
            cast = _delta(job, updates)
        except LoratoolError:  # factors beyond the dtype's range: nobody merged like that
            return orders
        orders |= {Order.FACTORS: _summed(cast, dtype), Order.ALL: _cast_first(cast, dtype)}
        if len(steps) > 1:
            alone = [_delta(job, one) for one in _by_adapter(updates)]
            orders[Order.STEPS_ALL] = _in_turn([_cast_first(one, dtype) for one in alone])
    return orders


def _by_adapter(updates: Sequence[PlacedUpdate]) -> list[list[PlacedUpdate]]:
    adapters = dict.fromkeys(update.adapter for update in updates)
    return [[one for one in updates if one.adapter == adapter] for adapter in adapters]


def _in_turn(merges: Sequence[Delta]) -> Delta:
    """One merge into the result of the other."""

    def merged(w0: Tensor, start: int) -> Tensor:
        for merge in merges:
            w0 = merge(w0, start)
        return w0

    return merged


def _summed(delta: Delta, dtype: torch.dtype) -> Delta:
    return lambda w0, start: (w0.float() + delta(w0, start).float()).to(dtype)


def _cast_first(delta: Delta, dtype: torch.dtype) -> Delta:
    return lambda w0, start: (w0.float() + delta(w0, start).float().to(dtype).float()).to(dtype)


def _with_factors_in(placed: PlacedUpdate, dtype: torch.dtype) -> PlacedUpdate:
    update = placed.update
    assert isinstance(update, LowRankUpdate)
    b, a = (MemoryTensor(one.read().to(dtype)) for one in (update.b, update.a))
    return replace(placed, update=replace(update, b=b, a=a))
