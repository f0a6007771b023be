"""The Karcher mean of the updates' directions."""

from __future__ import annotations

import torch
from torch import Tensor

from loratool.algebra.lowrank import LowRank
from loratool.combining.geometry import cosines, gram, norms
from loratool.combining.method import Parameter, Space, Updates, linear_combination, method
from loratool.errors import DisagreementError

_MAX_ITER = Parameter("max_iter", int, 10, "Steps at most.", low=1, high=10000)
_TOL = Parameter("tol", float, 1e-5, "Step length that ends the iteration.", low=0, open_low=True)


@method(
    "karcher",
    space=Space.FACTORS,
    source="Karcher 1977; the iteration of Grove, Karcher and Ruh on the unit sphere, as in "
    "mergekit (arXiv 2603.04972): μ ← exp_μ(Σ wᵢ·log_μ(uᵢ)), at the length Σ wᵢ‖ΔWᵢ‖",
    cost="O((m+n)·R² + R³)",
    weights="of the directions and of the lengths, divided by their sum",
    parameters=(_MAX_ITER, _TOL),
    notes="Runs on the N×N inner products, whatever the size of the weight. Zero updates have no "
    "direction and count for the length only; one that is opposite to the mean does not pull at "
    "it, since no way there is the shortest.",
)
def karcher(updates: Updates, *, max_iter: int, tol: float) -> LowRank:
    """The mean direction on the sphere, at the mean length."""
    weights = torch.tensor(updates.weights, dtype=torch.float64)
    products = gram(updates.updates)
    lengths = norms(products)
    present = lengths > 0
    total, directed = float(weights.sum()), float(weights[present].sum())
    if total == 0 or (directed == 0 and bool(present.any())):
        raise DisagreementError(f"{updates.name}: the weights add up to zero")
    if not bool(present.any()):
        return linear_combination(updates.updates, [0.0] * len(weights))
    units = cosines(products)[present][:, present]
    direction = _mean(units, weights[present] / directed, max_iter, tol)
    coefficients = torch.zeros_like(weights)
    length = float(weights @ lengths) / total
    coefficients[present] = length * direction / lengths[present]
    return linear_combination(updates.updates, coefficients.tolist())


def _mean(units: Tensor, weights: Tensor, max_iter: int, tol: float) -> Tensor:
    """The mean as a combination of unit vectors with these (N, N) inner products."""

    def length(c: Tensor) -> Tensor:
        return (c @ units @ c).clamp(min=0).sqrt()

    mean = weights
    if float(length(mean)) < tol:  # opposite directions: start at the first
        mean = torch.eye(len(weights), dtype=torch.float64)[0]
    mean = mean / length(mean)
    for _ in range(max_iter):
        dots = (units @ mean).clamp(-1, 1)
        angles = dots.acos()
        sines = angles.sin()
        far = sines >= tol  # neither where the mean is, nor opposite, where no way is the shortest
        stretch = torch.where(far, angles / torch.where(far, sines, 1.0), 0.0) * weights
        tangent = stretch - (stretch @ dots) * mean
        step = length(tangent)
        if float(step) < tol:
            break
        mean = step.cos() * mean + step.sin() * (tangent / step)
        mean = mean / length(mean)
    return mean
