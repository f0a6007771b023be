"""Model Stock: how far the mean is to be trusted, from the angle between the updates."""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import LowRank
from loratool.combining.geometry import cosines, gram
from loratool.combining.method import Space, Updates, linear_combination, method

_SINGULAR = 1e-6


@method(
    "model_stock",
    space=Space.FACTORS,
    source="Jang et al. 2024, Model Stock, arXiv 2403.19522, eq. 7: t = N·c/(1 + (N−1)·c), c the "
    "mean cosine over all pairs",
    cost="O((m+n)·R² + R³)",
    weights="multiply the updates",
    adapters=(2, None),
    notes="Made for tunes of the same task. Updates at right angles give t = 0, nothing at all, "
    "and negative cosines a negative t. Where 1 + (N−1)·c is below 10⁻⁶ the result is zero.",
)
def model_stock(updates: Updates) -> LowRank:
    """The mean of the updates, shrunk by how much they differ in direction."""
    count = len(updates.updates)
    pairs = torch.triu_indices(count, count, offset=1)
    cosine = float(cosines(gram(updates.weighted))[pairs[0], pairs[1]].mean())
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= _SINGULAR else 0.0
    return linear_combination(updates.weighted, [t / count] * count)
