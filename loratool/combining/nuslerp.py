"""Spherical interpolation with the place decided by the weights."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.combining.geometry import cosines, gram, norms, spherical
from loratool.combining.method import Space, Updates, linear_combination, method
from loratool.errors import DisagreementError

_PARALLEL = 1e-12
"""Of 1 − cos²: below, the arc of two opposite updates would be decided by rounding errors."""


@method(
    "nuslerp",
    space=Space.FACTORS,
    source="mergekit's NuSLERP (nuslerp_flatten): Shoemake 1985, eq. 3, with t = w₂/(w₁ + w₂); "
    "linear where 1 − cos² ≤ 10⁻¹² (mergekit: 10⁻¹⁶, which rounding decides) or an update is zero",
    cost="O((m+n)·R² + R³)",
    weights="decide the place between the updates, w₂/(w₁ + w₂), and do not scale them",
    adapters=(2, 2),
)
def nuslerp(updates: Updates) -> LowRank:
    """Spherical interpolation between two updates, at the place that their weights say."""
    whole = sum(updates.weights)
    if whole == 0:
        raise DisagreementError(
            f"{updates.name}: the weights add up to zero, so they name no place between the updates"
        )
    t = updates.weights[1] / whole
    products = gram(updates.updates)
    cosine = float(cosines(products)[0, 1])
    linear = 1 - cosine**2 <= _PARALLEL or not bool((norms(products) > 0).all())
    return linear_combination(updates.updates, (1 - t, t) if linear else spherical(cosine, t))
