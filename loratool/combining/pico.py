"""Pico: output directions that all adapters crowd into, turned down before the sum."""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import LowRank
from loratool.algebra.truncation import total
from loratool.combining.method import Space, Updates, method
from loratool.combining.spectral import contributing, nothing


@method(
    "pico",
    space=Space.FACTORS,
    source="Tang and Yang 2026, Crowded in B-Space, arXiv 2604.16826, and its code: with "
    "[B₁ … B_N] = U·S·Vᵀ and cₖ = Sₖ²/ΣS², B'ᵢ = Bᵢ + U·diag(1/(1+(N−1)cₖ) − 1)·Uᵀ·Bᵢ; the merged "
    "update is rescaled to the mean norm of the originals",
    cost="O((m+n)·R² + R³)",
    weights="multiply the calibrated updates; the mean norm is that of the weighted ones",
    notes="The merge rule is the sum. B is taken with the adapter's scale in it, which is the "
    "paper's where all scales are equal; as in the paper, the result depends on how an update is "
    "split into B and A. N counts the adapters that change the weight.",
)
def pico(updates: Updates) -> LowRank:
    """The sum of updates whose shared output directions are weakened, at their mean norm."""
    both = zip(updates.updates, updates.weights, strict=True)
    pairs = [(update, weight) for update, weight in both if update.norm() and weight]
    if not pairs:
        return nothing(updates)
    scaled = [update.scale * update.b.double() for update, _ in pairs]
    q, r = torch.linalg.qr(torch.cat(scaled, dim=1))
    left, values, _ = torch.linalg.svd(r, full_matrices=False)
    u, energy = q @ left, values.square()
    change = 1 / (1 + (len(pairs) - 1) * energy / energy.sum()) - 1
    calibrated = [
        LowRank(b + u @ (change[:, None] * (u.T @ b)), update.a, weight)
        for b, (update, weight) in zip(scaled, pairs, strict=True)
    ]
    merged = total(calibrated)
    size = merged.norm()
    wanted = sum(value.norm() for value in contributing(updates)) / len(pairs)
    return merged * (wanted / size) if size else nothing(updates)
