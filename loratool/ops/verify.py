"""Is a merged checkpoint what its base and adapters make of each other?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loratool.adapter import Adapter
from loratool.engine import Engine, NoProgress, Progress
from loratool.engine.devices import resolve_device
from loratool.errors import UsageError
from loratool.layouts.names import match_names
from loratool.layouts.placed import TieChoice
from loratool.layouts.placing import PlacedUpdate, can_be_untied, describe, place
from loratool.layouts.scales import ScaledBy
from loratool.ops.eight_bits import scales_of
from loratool.ops.merge_inputs import added_by, chosen_of
from loratool.ops.merge_layout import Added
from loratool.ops.receipt_match import given_as_recorded
from loratool.ops.restoring import beyond, leading, value_sha256
from loratool.ops.sources import Model, open_adapters, open_model
from loratool.ops.unmerge_checks import find_receipt
from loratool.ops.verify_report import VerifyReport
from loratool.ops.verify_row import Status, VerifyJob, VerifyRow
from loratool.ops.verify_tensor import verify_tensor
from loratool.receipt import Receipt, read_receipt
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Lengthened, Stored

SAMPLED_ROWS = 64
"""Of each tensor, with --fast and no receipt."""


@dataclass(frozen=True)
class VerifyPlan:
    """What is to be compared. receipt: hashes to go by instead of the base's values. sampled: only
    some rows of each tensor are compared. added: tensors that the merge adds. grown: rows of tables
    that got tokens. scaled: of tensors in 8 bits. tensors: the merged ones by the base's names."""

    merged: Model
    tensors: Mapping[str, TensorInfo]
    base: Model | None
    adapters: tuple[tuple[Path, float, Adapter], ...]
    receipt_path: Path | None
    receipt: Receipt | None
    updates: Mapping[str, tuple[PlacedUpdate, ...]]
    added: Mapping[str, Added]
    grown: Mapping[str, int]
    scaled: Mapping[str, ScaledBy]
    sampled: bool
    seed: int
    device: torch.device
    notes: tuple[str, ...]


def plan_verify(
    merged: Path,
    base: Path | None,
    adapters: Sequence[tuple[Path, float]],
    *,
    fast: bool = False,
    receipt: Path | None = None,
    alpha: float | None = None,
    device: str = "auto",
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> VerifyPlan:
    """Read headers and place the adapters on the base.

    include, exclude: which of the adapters' updates should be in, as in the merge.
    fast: go by a receipt's hashes where there is one, else by a sample of rows. Raises InputError,
    DisagreementError (an adapter that does not fit the base or the receipt), UsageError.
    """
    if not adapters:
        raise UsageError("no adapter is named", hint="name it with --adapter PATH[:WEIGHT]")
    model = open_model(merged)
    values, left_out = chosen_of(
        open_adapters([path for path, _ in adapters], alpha), include, exclude
    )
    opened = tuple((*one, value) for one, value in zip(adapters, values, strict=True))
    weighted = [(adapter, weight) for _, weight, adapter in opened]
    found = find_receipt(model, receipt) if fast or receipt else None
    known = read_receipt(found) if found else None
    base_model = open_model(base) if base is not None else None
    origin = base_model or (model if known is not None else None)
    if origin is None:
        raise UsageError(
            "without --base there is nothing to compare with",
            hint="name the base; with --fast, a receipt can stand for it",
        )
    untied = not model.config.says_tied and can_be_untied(origin.checkpoint.tensors, origin.config)
    placement = place(
        weighted,
        origin.checkpoint.tensors,
        origin.config,
        add_bias=True,
        ties=TieChoice.APART if untied else TieChoice.BOTH,
        grow=True,
    )
    updates: Mapping[str, tuple[PlacedUpdate, ...]] = placement.updates | placement.added
    if known is not None:
        assert found is not None
        updates = given_as_recorded(known, found, opened, placement.updates, left_out)
    added = added_by(placement, origin.checkpoint.tensors)
    tensors: Mapping[str, TensorInfo] = model.checkpoint.tensors
    notes = placement.notes
    if known is None:  # a receipt is of loratool's own merge, which keeps names
        matched = match_names(tensors, {*origin.checkpoint.tensors, *added})
        tensors = {matched.found.get(name, name): info for name, info in tensors.items()}
        if matched.note:
            notes = (f"{matched.note} of the merged checkpoint in the base", *notes)
    return VerifyPlan(
        model,
        tensors,
        base_model,
        opened,
        found,
        known,
        updates,
        added,
        placement.grown,
        scales_of(updates, origin, lossy=True),
        fast and known is None,
        seed,
        resolve_device(device),
        notes,
    )


def run_verify(
    plan: VerifyPlan, engine: Engine | None = None, progress: Progress | None = None
) -> VerifyReport:
    """Compare every tensor. Raises NonFiniteValues where the base or an adapter holds NaN."""
    engine, progress = engine or Engine(), progress or NoProgress()
    if plan.receipt is not None:
        rows = _verify_hashes(plan, engine, progress)
    else:
        rows = _verify_values(plan, engine, progress)
    return VerifyReport.of(rows, _facts(plan))


def _facts(plan: VerifyPlan) -> dict[str, object]:
    how = "every value"
    if plan.receipt is not None:
        how = "hashes of the receipt"
    elif plan.sampled:
        how = f"up to {SAMPLED_ROWS} rows of each tensor"
    return {
        "merged": plan.merged.checkpoint.path.resolve().name,
        "base": plan.base.checkpoint.path.resolve().name if plan.base else None,
        "adapters": [
            {"name": path.resolve().name, "format": adapter.format, "weight": weight}
            for path, weight, adapter in plan.adapters
        ],
        "compared": how,
        "seed": plan.seed if plan.sampled else None,
        "device": str(plan.device),
        "notes": list(plan.notes),
    }


def _verify_values(plan: VerifyPlan, engine: Engine, progress: Progress) -> list[VerifyRow]:
    assert plan.base is not None
    merged = plan.tensors
    base: dict[str, Stored] = dict(plan.base.checkpoint.tensors)
    base |= {name: added.source for name, added in plan.added.items()}
    base |= {name: Lengthened(base[name], rows) for name, rows in plan.grown.items()}
    rows, jobs = [], []
    for name, info in base.items():
        ours = merged.get(name)
        if ours is None or ours.shape != info.shape or info.dtype.is_float != ours.dtype.is_float:
            rows.append(_unfit(name, info, ours, plan))
        else:
            jobs.append(_job(name, info, ours, plan))
    rows += [_extra(name, info) for name, info in merged.items() if name not in base]
    rows += engine.map(
        verify_tensor, jobs, cost=lambda job: job.cost, progress=progress, what="verifying"
    )
    order = {name: index for index, name in enumerate([*base, *merged])}
    return sorted(rows, key=lambda row: order[row.name])


def _job(name: str, base: Stored, merged: TensorInfo, plan: VerifyPlan) -> VerifyJob:
    placed = plan.updates.get(name, ())
    chosen = sample_rows(base.rows, f"{plan.seed}:{name}") if plan.sampled else None
    update = describe(placed) if placed else ""
    scaled = plan.scaled.get(name)
    return VerifyJob(name, base, merged, placed, update, plan.device, chosen, scaled)


def sample_rows(rows: int, key: str) -> tuple[int, ...] | None:
    """Up to SAMPLED_ROWS rows, a function of ``key``; None where that is all of them."""
    if rows <= SAMPLED_ROWS:
        return None
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = generator.choice(rows, SAMPLED_ROWS, replace=False)
    return tuple(sorted(int(row) for row in chosen))


def _unfit(name: str, base: Stored, merged: TensorInfo | None, plan: VerifyPlan) -> VerifyRow:
    placed = plan.updates.get(name, ())
    update = describe(placed) if placed else ""
    if merged is None:
        return VerifyRow(name, update, Status.MISSING, base.numel, 0)
    detail = (
        f"{base.dtype.name} {list(base.shape)} in the base, {merged.dtype.name} "
        f"{list(merged.shape)} merged"
    )
    return VerifyRow(name, update, Status.SHAPE, base.numel, 0, detail=detail)


def _extra(name: str, info: TensorInfo) -> VerifyRow:
    return VerifyRow(name, "", Status.EXTRA, info.numel, 0)


# By hashes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HashJob:
    name: str
    update: str
    info: Stored
    expected: str
    base: TensorInfo | None
    base_expected: str

    @property
    def cost(self) -> int:
        return self.info.nbytes


def _verify_hashes(plan: VerifyPlan, engine: Engine, progress: Progress) -> list[VerifyRow]:
    assert plan.receipt is not None
    merged = plan.merged.checkpoint.tensors
    base = plan.base.checkpoint.tensors if plan.base else {}
    layout = plan.receipt.base_tensors(plan.merged.checkpoint.folder)
    rows, jobs = [], []
    for name, record in plan.receipt.tensors.items():
        placed = plan.updates.get(name, ())
        if not record.merged_sha256:
            continue
        info = leading(merged.get(name), layout[name].shape)
        if info is None:
            rows.append(_unfit(name, layout[name], merged.get(name), plan))
        else:
            update = describe(placed) if placed else ""
            hashes = (record.merged_sha256, base.get(name), record.base_sha256)
            jobs.append(_HashJob(name, update, info, *hashes))
    for name, more in beyond(layout, merged).items():
        expected = plan.receipt.added.get(name)
        if expected is not None:
            jobs.append(_HashJob(name, "added", more, expected, None, ""))
        elif name in layout:
            rows.append(_unfit(name, layout[name], merged[name], plan))
        else:
            rows.append(_extra(name, merged[name]))
    lost = set(plan.receipt.added) - set(merged)
    rows += [VerifyRow(name, "added", Status.MISSING, 0, 0) for name in sorted(lost)]
    return rows + engine.map(
        _verify_hash, jobs, cost=lambda job: job.cost, progress=progress, what="hashing"
    )


def _verify_hash(job: _HashJob) -> VerifyRow:
    numel = job.info.numel
    row = VerifyRow(job.name, job.update, Status.EQUAL, numel, numel)
    if value_sha256(job.info) != job.expected:
        status = Status.OFF if job.update else Status.CHANGED
        return VerifyRow(
            job.name, job.update, status, numel, numel, detail="not the values that merge wrote"
        )
    if job.base is not None and value_sha256(job.base) != job.base_expected:
        return VerifyRow(
            job.name, job.update, Status.OFF, numel, numel, detail="merged from another base"
        )
    return row
