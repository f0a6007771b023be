"""Interpolation along the arc between two updates."""

from __future__ import annotations

from loratool.algebra.lowrank import LowRank
from loratool.combining.geometry import cosines, gram, norms, spherical
from loratool.combining.method import Parameter, Space, Updates, linear_combination, method

_T = Parameter("t", float, 0.5, "Place between the first (0) and the second (1).", low=0, high=1)
_NEARLY_PARALLEL = 0.9995


@method(
    "slerp",
    space=Space.FACTORS,
    source="Shoemake 1985, Animating rotation with quaternion curves, eq. 3; linear where "
    "|cos| > 0.9995, as in mergekit, and where an update is zero and so has no direction",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates, which the angle does not feel; t decides between them",
    parameters=(_T,),
    adapters=(2, 2),
)
def slerp(updates: Updates, *, t: float) -> LowRank:
    """Spherical interpolation between two updates."""
    products = gram(updates.weighted)
    cosine = float(cosines(products)[0, 1])
    linear = abs(cosine) > _NEARLY_PARALLEL or not bool((norms(products) > 0).all())
    return linear_combination(updates.weighted, (1 - t, t) if linear else spherical(cosine, t))
