"""KnOTS: TIES on what the updates are in one common basis."""

from __future__ import annotations

from loratool.algebra.frames import left_basis
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
from loratool.combining.spectral import as_blocks, gathered, nothing
from loratool.errors import DisagreementError

FLOOR = Parameter(
    "floor", float, 1e-5, "Directions with singular values up to this are left out.", low=0
)
PARTS = Parameter(
    "parts",
    str,
    "v",
    "Merge the right singular vectors alone (v), or times their singular values (sv).",
    choices=("v", "sv"),
)


@method(
    "knots_ties",
    space=Space.CORE,
    source="Stoica et al. 2024, KnOTS, arXiv 2410.19735: [ΔW₁ … ΔW_N] = U·Σ·[V₁ … V_N], "
    "result U·Σ·TIES(V₁, …, V_N)",
    cost="O((m+n)·R² + R³), and TIES on N matrices of R·n elements",
    weights="multiply the trimmed parts before signs are elected",
    parameters=(with_default(DENSITY, 0.2), LAMBDA, NORMALIZE, MAJORITY, FLOOR, PARTS),
    notes="The authors' code trims Σ·Vᵢ, which favours the strong directions, over all weights at "
    "once; this trims each weight's by itself, and Vᵢ as the paper has it unless parts is sv.",
)
def knots_ties(
    updates: Updates,
    *,
    density: float,
    lambda_: float,
    normalize: bool,
    majority: str,
    floor: float,
    parts: str,
) -> LowRank:
    """TIES on the right singular vectors of all updates side by side; the left ones are shared."""
    u, sigma = left_basis(updates.updates)
    kept = sigma > floor
    if len(sigma) and not bool(kept.any()):
        raise DisagreementError(
            f"{updates.name}: no singular value of the updates exceeds the floor of {floor:g}, "
            f"the largest is {float(sigma[0]):.3g}",
            hint="give a smaller --floor",
        )
    u, sigma = u[:, kept], sigma[kept]
    if not len(sigma):
        return nothing(updates)
    images = [x.scale * (u.T @ x.b.double()) @ x.a.double() for x in updates.updates]
    if parts == "v":
        images = [image / sigma[:, None] for image in images]
    merged = agreeing_sum(
        [keep_largest(as_blocks(image), density) for image in images],
        updates.weights,
        majority=majority,
        normalize=normalize,
        factor=lambda_,
    )
    return LowRank(u * sigma if parts == "v" else u, gathered(merged))
