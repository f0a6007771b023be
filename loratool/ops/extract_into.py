"""Continuing from an adapter: its factors are kept, and only what they leave is factorised.

With the adapter's update s·B₀·A₀ and the change D, the rank rule looks at the rest
E = D − s·B₀·A₀, and the result is D ≈ s·[B₀ B]·[A₀; A]: the old factors as they were, the new
ones at the same scale, so that a module has one. (The best factors of D alone would need fewer
components; keeping the old ones is the point.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    LowRankUpdate,
    ModuleKind,
    Replacement,
    TokenRows,
    module_of,
)
from loratool.errors import DisagreementError, UnsupportedInput, UsageError
from loratool.layouts.pairs import Pair
from loratool.layouts.placing import place
from loratool.ops.extract_jobs import ExtractJob, Start, Treatment
from loratool.ops.sources import Model
from loratool.plural import counted
from loratool.storage.tensors import TensorInfo


def continue_from(
    adapter: Adapter, jobs: Sequence[ExtractJob], base: Model, *, drop_rest: bool = False
) -> tuple[list[ExtractJob], tuple[str, ...]]:
    """The jobs, each with the update that it starts from, and what there is to say.

    What the adapter changes otherwise than by factors is left to the tuned checkpoint, or dropped
    with the rest. Raises what
    ``place`` raises for an adapter of another base, UnsupportedInput for updates that are not
    low-rank, and UsageError where one would be lost because its tensor is left out.
    """
    placement = place([(adapter, 1.0)], base.checkpoint.tensors, base.config)
    every = [placed for updates in placement.updates.values() for placed in updates]
    of_members = [placed.source for placed in every if placed.member is not None]
    if of_members:
        raise _of_experts(of_members)
    of_parts = [placed.source for placed in every if placed.places is not None]
    if of_parts:
        raise UsageError(
            f"--into: {counted(len(of_parts), 'update is', 'updates are')} of parts of a matrix "
            "that the base has whole, or of several that it has apart; only those of the base's "
            "own matrices are continued",
            details=of_parts[:12],
            hint="extract without --into, then combine the two adapters",
        )
    notes = list(placement.notes)
    starts: dict[str, Start] = {}
    whole = 0
    for target, updates in placement.updates.items():
        for placed in updates:
            if isinstance(placed.update, Replacement | DenseUpdate | TokenRows):
                whole += 1
            elif not isinstance(placed.update, LowRankUpdate) or len(updates) > 1:
                raise UnsupportedInput(
                    f"--into: {placed.source}: is not one low-rank update of one matrix"
                )
            elif placed.update.scale == 0 or not math.isfinite(placed.update.scale):
                raise DisagreementError(f"--into: {placed.source}: has scale {placed.update.scale}")
            else:
                starts[target] = Start(
                    placed.source, placed.update, placed.transposed or placed.update.is_embedding
                )
    if not starts:
        raise UsageError("--into: the adapter has no low-rank update to continue from")
    if whole:
        where = "left out" if drop_rest else "taken from tuned"
        notes.append(
            f"{where}: {counted(whole, 'parameter')} that --into does not update by factors"
        )
    scales = Counter(start.update.scale for start in starts.values())
    usual = scales.most_common(1)[0][0]
    lost, continued = [], []
    for job in jobs:
        start = starts.pop(_stored_name(job.pair), None)
        if start is None or job.treatment is Treatment.WHOLE:
            continued.append(replace(job, scale=usual))
        elif job.treatment is Treatment.LOW_RANK:
            continued.append(replace(job, scale=start.update.scale, start=start))
        else:
            lost.append(start.source)
    scales_by_module = {module_of(job.pair.name): job.scale for job in continued if job.start}
    continued = [
        replace(job, scale=scales_by_module.get(module_of(job.pair.name), job.scale))
        for job in continued
    ]
    _refuse_parts(starts, jobs)
    if lost:
        raise UsageError(
            f"--into: {counted(len(lost), 'update')} of the adapter would be lost, for their "
            "tensors are left out",
            details=lost[:12],
            hint="loosen --include, --exclude and --targets",
        )
    return continued, tuple(notes)


def _refuse_parts(starts: Mapping[str, Start], jobs: Sequence[ExtractJob]) -> None:
    """starts: those whose tensors no job has as one matrix. Raises UsageError with the reason."""
    if not starts:
        return
    sources = [start.source for start in starts.values()]
    if any(job.pair.kind is ModuleKind.EXPERT for job in jobs):
        raise _of_experts(sources)
    raise UsageError(
        f"--into: {counted(len(sources), 'update')} of what is extracted in parts",
        details=sources[:12],
        hint="without --split-fused, fused projections stay whole and are continued",
    )


def _of_experts(sources: Sequence[str]) -> UsageError:
    return UsageError(
        f"--into: {counted(len(sources), 'update is', 'updates are')} of experts, which are "
        "extracted one by one and padded to one rank; only updates of whole matrices are continued",
        details=sources[:12],
        hint="extract without --into",
    )


def _stored_name(pair: Pair) -> str:
    """The base's name of the tensor that is the whole of ``pair``, or ''."""
    if isinstance(pair.base, TensorInfo) and pair.kind is not ModuleKind.EXPERT:
        return pair.base.name
    return ""
