"""The elementwise rules in core space: on small matrices in joint bases, not on the weights.

Another method than the rule it comes from: what is trimmed, dropped or out-voted are coordinates
in the bases, not elements of the weight. Rules that only add (svd, linear, …) are the same there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loratool.algebra.frames import joint_frame
from loratool.algebra.lowrank import LowRank
from loratool.combining.method import Method, Space, Updates, Value
from loratool.combining.spectral import gathered, nothing


def in_core_space(rule: Method) -> Method:
    """``core_RULE``: the rule on each update's coordinates UᵀΔWᵢV, then back."""

    def run(updates: Updates, **parameters: Value) -> LowRank:
        frame = joint_frame(updates.updates)
        if not frame.u.shape[1]:
            return nothing(updates)
        unit = torch.eye(frame.v.shape[1], dtype=torch.float64, device=frame.v.device)
        cores = tuple(LowRank(core, unit) for core in frame.cores)
        return frame.lift(gathered(rule.run(replace(updates, updates=cores), **parameters)))

    run.__doc__ = f"{rule.name} on the updates' coordinates in joint bases of their spaces."
    return replace(
        rule,
        name=f"core_{rule.name}",
        run=run,
        space=Space.CORE,
        source=f"Panariello et al. 2025, Core Space, arXiv 2509.17786, with the rule of "
        f"{rule.name} (its source: {rule.source})",
        cost="O((m+n)·R² + R³), and the rule on N matrices of at most R² elements",
        notes="The bases are the left singular vectors of [ΔW₁ … ΔW_N] and the right ones of "
        "[ΔW₁; …; ΔW_N], signs fixed; the paper takes those of the stacked factors, which "
        "depend on how each update is split." + (f" {rule.notes}" if rule.notes else ""),
    )
