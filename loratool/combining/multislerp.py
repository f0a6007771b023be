"""Barycentric interpolation on a sphere."""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import LowRank
from loratool.combining.elementwise import NORMALIZE
from loratool.combining.geometry import COLLINEAR, gram, norms
from loratool.combining.method import Space, Updates, linear_combination, method
from loratool.errors import DisagreementError


@method(
    "multislerp",
    space=Space.FACTORS,
    source="Goddard 2025, Multi-SLERP (goddard.blog/posts/multislerp-wow-what-a-cool-idea), as in "
    "mergekit: project to the tangent space at the weighted mean direction, average, project back",
    cost="O((m+n)·R² + R³)",
    weights="of the directions and of the lengths; divided by their sum unless normalize is off",
    parameters=(NORMALIZE,),
    notes="The average in the tangent space is always zero, since it is taken at the weighted mean "
    "with the same weights; so the result is that mean direction, at the mean length. Opposite "
    "updates whose mean direction vanishes are interpolated linearly if they are two, and refused "
    "otherwise.",
)
def multislerp(updates: Updates, *, normalize: bool) -> LowRank:
    """The weighted mean direction of the updates, at their weighted mean length."""
    weights = torch.tensor(updates.weights, dtype=torch.float64)
    if normalize:
        if float(weights.sum()) == 0:
            raise DisagreementError(f"{updates.name}: the weights add up to zero")
        weights = weights / weights.sum()
    products = gram(updates.updates)
    lengths = norms(products)
    per_unit = torch.where(lengths > 0, weights / torch.where(lengths > 0, lengths, 1.0), 0.0)
    size = float((per_unit @ products @ per_unit).clamp(min=0).sqrt())
    if size < COLLINEAR:
        if len(weights) > 2 and bool((lengths > 0).any()):
            raise DisagreementError(
                f"{updates.name}: the updates cancel each other's directions; they have no mean",
                hint="choose other weights",
            )
        return linear_combination(updates.updates, weights.tolist())
    length = float(weights @ lengths)
    return linear_combination(updates.updates, (per_unit * (length / size)).tolist())
