"""SVC: the sum, with what several updates repeat counted once."""

from __future__ import annotations

import torch

from loratool.algebra.lowrank import LowRank
from loratool.combining.method import Parameter, Space, Updates, method
from loratool.combining.spectral import contributing, nothing, of_sum

ALPHA = Parameter(
    "least", float, 1.0, "Lowest calibration factor; 1 never strengthens a direction.", low=0,
    open_low=True,
)  # fmt: skip


@method(
    "svc",
    space=Space.CORE,
    source="Li et al. 2026, singular value calibration, arXiv 2602.05536, and its code: for each "
    "left singular vector u of M = Σ ΔWᵢ, σ' = σ / mean_i max(⟨uᵀM, uᵀΔWᵢ⟩ / ‖uᵀΔWᵢ‖², α)",
    cost="O((m+n)·R² + N·R³)",
    weights="multiply the updates",
    parameters=(ALPHA,),
    notes="The paper's α is --least; 1 is its value for a sum, 1/N its value for a mean. A "
    "direction that an update does not have counts as α for it. A single adapter is itself.",
)
def svc(updates: Updates, *, least: float) -> LowRank:
    """The sum, each singular value divided by how much the updates repeat its direction."""
    values = contributing(updates)
    if not values:
        return nothing(updates)
    u, sigma, v = of_sum(values)
    noise = (sum(updates.shape)) * 2.0**-52 * sum(value.norm() for value in values)
    factors = []
    for value in values:
        left = value.scale * (u.T @ value.b.double())
        r = torch.linalg.qr(value.a.double().T, mode="r").R
        energy = (left @ r.T).square().sum(dim=1)
        inner = sigma * (left * (value.a.double() @ v).T).sum(dim=1)
        present = energy > noise**2
        ratio = torch.where(present, inner / torch.where(present, energy, 1.0), 0.0)
        factors.append(ratio.clamp(min=least))
    return LowRank(u * (sigma / torch.stack(factors).mean(dim=0)), v.T)
