"""Differences of biases, combined by the method of the weights.

A vector counts as a matrix of one column. It is stored with the scale of its module's factors,
which are there even where they came out as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import DenseUpdate, LowRankUpdate
from loratool.algebra.lowrank import LowRank
from loratool.combining.method import Updates
from loratool.ops.biases import load_bias, store_bias, weight_of
from loratool.ops.combine_plan import CombinePlan
from loratool.ops.combine_report import UpdateRow
from loratool.ops.stacks import nothing_like


@dataclass(frozen=True)
class CombinedBiases:
    """low_rank: the updates of weights, with one of zero for each weight that needs it now."""

    low_rank: Mapping[str, LowRankUpdate]
    updates: Mapping[str, DenseUpdate]
    rows: tuple[UpdateRow, ...]


def combine_biases(plan: CombinePlan, low_rank: Mapping[str, LowRankUpdate]) -> CombinedBiases:
    """low_rank: what became of the weights. Raises NonFiniteValues, RangeOverflow."""
    modules, updates, rows = dict(low_rank), {}, []
    likes = {job.name: job.like for job in plan.jobs}
    for name, found in plan.biases.items():
        exact = _combined(plan, name, found)
        norm, error = float(exact.norm()), 0.0
        if norm:
            weight = weight_of(name)
            if weight not in modules:
                key = f"{plan.asked.seed}:{weight}"
                modules[weight] = nothing_like(likes[weight], plan.dtype, 1.0, key)
            stored = store_bias(name, exact, modules[weight], plan.dtype)
            updates[name], error = stored.update, stored.error / norm
        ranks = tuple(int(update is not None) for update in found)
        shape = (len(exact), 1)
        rows.append(
            UpdateRow(name, shape, ranks, plan.weights[name], int(norm > 0), norm, error, "bias")
        )
    return CombinedBiases(modules, updates, tuple(rows))


def _combined(plan: CombinePlan, name: str, found: tuple[DenseUpdate | None, ...]) -> Tensor:
    (size,) = next(update.shape for update in found if update is not None)
    b = torch.zeros(size, 0, dtype=torch.float32)
    nothing = LowRank(b, b.new_zeros(0, 1))
    values = tuple(
        nothing if update is None else load_bias(source.label, name, update)
        for source, update in zip(plan.asked.sources, found, strict=True)
    )
    updates = Updates(name, values, plan.weights[name], plan.asked.seed)
    combined = plan.method(updates, plan.parameters)
    if isinstance(combined, LowRank):
        return combined.dense()[:, 0]
    return torch.cat([block for _, block in combined])[:, 0].double()
