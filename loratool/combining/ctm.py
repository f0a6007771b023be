"""CtM: compress all updates into one pair of subspaces first, then merge there."""

from __future__ import annotations

from loratool.algebra.factorize import left_signs
from loratool.algebra.frames import common_subspaces, joint_frame
from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import (
    DENSITY,
    LAMBDA,
    MAJORITY,
    NORMALIZE,
    agreeing_sum,
    keep_largest,
    with_default,
)
from loratool.combining.method import Parameter, Space, Updates, method
from loratool.combining.spectral import COMPONENTS, as_blocks, gathered, nothing

BETA = Parameter(
    "beta",
    float,
    0.25,
    "How far the subspaces follow the updates' own norms (1) or treat them alike (0).",
    low=0,
    high=1,
)


@method(
    "ctm",
    space=Space.CORE,
    source="He et al. 2026, Compress then Merge, arXiv 2606.03723, and its code: U, V from a "
    "Tucker decomposition of the updates rescaled to β‖ΔWᵢ‖ + (1−β)·mean‖ΔW‖, result "
    "U·TIES(UᵀΔW₁V, …)·Vᵀ",
    cost="O((m+n)·R² + N·R³) a step of the decomposition",
    weights="multiply the trimmed coordinates before signs are elected",
    parameters=(COMPONENTS, BETA, with_default(DENSITY, 0.2), LAMBDA, NORMALIZE, MAJORITY),
    keeps_rank=True,
    notes="components is the rank r of the subspaces, by default the largest rank of the updates. "
    "Takes no --rank: the rank is decided before the merge.",
)
def ctm(
    updates: Updates,
    *,
    components: int,
    beta: float,
    density: float,
    lambda_: float,
    normalize: bool,
    majority: str,
) -> LowRank:
    """TIES on each update's coordinates in the pair of r-dimensional subspaces that fits all."""
    frame = joint_frame(updates.updates)
    norms = [float(core.norm()) for core in frame.cores]
    present = [norm for norm in norms if norm]
    if not present:
        return nothing(updates)
    mean = sum(present) / len(present)
    proxies = [
        core * (beta + (1 - beta) * mean / norm)
        for core, norm in zip(frame.cores, norms, strict=True)
        if norm
    ]
    largest = max(x.rank for x, norm in zip(updates.updates, norms, strict=True) if norm)
    rank = min(components or largest, *frame.cores[0].shape)
    left, right = common_subspaces(proxies, rank)
    left = left * left_signs(frame.u @ left)
    right = right * left_signs(frame.v @ right)
    merged = agreeing_sum(
        [keep_largest(as_blocks(left.T @ core @ right), density) for core in frame.cores],
        updates.weights,
        majority=majority,
        normalize=normalize,
        factor=lambda_,
    )
    return LowRank(frame.u @ left @ gathered(merged), (frame.v @ right).T)
