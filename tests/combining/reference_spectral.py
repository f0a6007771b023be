"""The methods on singular vectors again, from their papers, on whole matrices in float64.

Nothing here comes from the package. What papers write for matrices of full rank is written for
the numerically nonzero part where the declaration says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.combining import reference

CASES: list[tuple[str, dict[str, Any]]] = [
    ("knots_ties", {}),
    ("knots_ties", {"parts": "sv", "density": 0.6, "normalize": False}),
    ("knots_ties", {"floor": 20.0, "density": 0.5}),
    ("tsv_m", {}),
    ("tsv_m", {"lambda": 0.3}),
    ("iso_c", {}),
    ("iso_c", {"components": 3, "lambda": 2.0}),
    ("iso_cts", {}),
    ("iso_cts", {"components": 6, "common": 0.5}),
    ("iso_cts", {"common": 1.0}),
    ("svc", {}),
    ("svc", {"least": 0.25}),
    ("pico", {}),
    ("ctm", {}),
    ("ctm", {"components": 3, "beta": 1.0, "density": 0.5, "majority": "frequency"}),
    ("core_ties", {}),
    ("core_dare_linear", {"density": 0.4}),
    ("core_dare_ties", {}),
    ("core_della", {}),
    ("core_breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("core_magnitude_prune", {"density": 0.3}),
    ("core_sce", {"density": 0.5}),
    ("core_ties", {"density": 0.5, "normalize": False, "majority": "frequency"}),
]

FLATTENING = ("iso_c", "iso_cts")
"""Methods that change a single update, by design."""

Triplets = tuple[Tensor, Tensor, Tensor]


def svd(matrix: Tensor, most: int | None = None) -> Triplets:
    """u, σ, v of the numerically nonzero part."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = int((s > 1e-10 * s[0]).sum()) if len(s) and s[0] > 0 else 0
    k = k if most is None else min(k, most)
    return u[:, :k], s[:k], vh[:k].T


def positive(basis: Tensor) -> Tensor:
    """With the largest entry of each vector positive."""
    return basis * torch.sign(basis[basis.abs().argmax(0), range(basis.shape[1])])


def procrustes(matrix: Tensor) -> Tensor:
    u, _, v = svd(matrix)
    return u @ v.T


def knots_ties(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    u, s, v = svd(torch.cat(deltas, dim=1))
    keep = s > given.get("floor", 1e-5)
    u, s, v = u[:, keep], s[keep], v[:, keep]
    parts = [part.T for part in v.split(deltas[0].shape[1])]
    if given.get("parts", "v") == "sv":
        return u @ reference.ties([s[:, None] * part for part in parts], weights, **given)
    return (u * s) @ reference.ties(parts, weights, **given)


def tsv_m(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    k = max(1, min(deltas[0].shape) // len(deltas))
    found = [svd(delta * weight, k) for delta, weight in zip(deltas, weights, strict=True)]
    left = procrustes(torch.cat([u for u, _, _ in found], dim=1))
    right = procrustes(torch.cat([v for _, _, v in found], dim=1))
    sigma = torch.cat([s for _, s, _ in found])
    return given.get("lambda", 1.0) * left @ torch.diag(sigma) @ right.T


def iso_c(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    u, s, v = svd(reference.plain_sum(deltas, weights), given.get("components"))
    return given.get("lambda", 1.0) * s.mean() * u @ v.T


def iso_cts(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    tasks = reference.weighted(deltas, weights)
    u, s, v = svd(torch.stack(tasks).sum(0))
    size = min(given.get("components", len(s)), *deltas[0].shape)
    common = int(size * given.get("common", 0.8))
    specific = round((size - common) / len(tasks)) * len(tasks)
    common = size - specific
    each = specific // len(tasks)
    u, s, v = u[:, :common], s[:common], v[:, :common]
    found = [svd(task - u @ u.T @ task, each) for task in tasks] if each else []
    left = torch.cat([u, *(triplet[0] for triplet in found)], dim=1)
    right = torch.cat([v, *(triplet[2] for triplet in found)], dim=1)
    sigma = torch.cat([s, *(triplet[1] for triplet in found)])
    return sigma.mean() * procrustes(left) @ procrustes(right).T


def svc(deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    tasks = reference.weighted(deltas, weights)
    merged = torch.stack(tasks).sum(0)
    u, s, v = svd(merged)
    calibrated = s.clone()
    for r in range(len(s)):
        response = u[:, r] @ merged
        factors = []
        for task in tasks:
            own = u[:, r] @ task
            ratio = float(response @ own / (own @ own)) if own.norm() > 1e-12 else 0.0
            factors.append(max(ratio, given.get("least", 1.0)))
        calibrated[r] = s[r] / (sum(factors) / len(factors))
    return (u * calibrated) @ v.T


def pico(deltas: list[Tensor], weights: list[float], *, factors: list[Tensor]) -> Tensor:
    """factors: each adapter's s·B."""
    u, s, _ = svd(torch.cat(factors, dim=1))
    crowding = s**2 / (s**2).sum()
    alpha = 1 / (1 + (len(deltas) - 1) * crowding)
    calibrated = [delta + u @ torch.diag(alpha - 1) @ u.T @ delta for delta in deltas]
    merged = reference.plain_sum(calibrated, weights)
    norms = [float(task.norm()) for task in reference.weighted(deltas, weights)]
    return merged * (sum(norms) / len(norms) / merged.norm())


def ctm(deltas: list[Tensor], weights: list[float], *, rank: int, **given: Any) -> Tensor:
    """Tucker by HOSVD and HOOI on the whole tensor, no core space. rank: the default's."""
    beta, r = given.get("beta", 0.25), min(given.get("components", rank), *deltas[0].shape)
    mean = sum(float(delta.norm()) for delta in deltas) / len(deltas)
    tensor = torch.stack(
        [delta / delta.norm() * (beta * delta.norm() + (1 - beta) * mean) for delta in deltas]
    )

    def leading(rows: Tensor) -> Tensor:
        return torch.linalg.svd(rows, full_matrices=False).U[:, :r]

    u = leading(torch.cat(list(tensor), dim=1))
    v = leading(torch.cat(list(tensor.mT), dim=1))
    errors: list[float] = []
    while len(errors) < 2 or abs(errors[-2] - errors[-1]) >= 1e-6:
        u = leading(torch.cat(list(tensor @ v), dim=1))
        v = leading(torch.cat(list(tensor.mT @ u), dim=1))
        missed = tensor - u @ (u.T @ tensor @ v) @ v.T
        errors.append(float(missed.norm() / tensor.norm()))
    u, v = positive(u), positive(v)
    return u @ reference.ties([u.T @ delta @ v for delta in deltas], weights, **given) @ v.T


def in_core_space(rule: str, deltas: list[Tensor], weights: list[float], **given: Any) -> Tensor:
    u, _, _ = svd(torch.cat(deltas, dim=1))
    _, _, v = svd(torch.cat(deltas, dim=0))
    u, v = positive(u), positive(v)
    return u @ getattr(reference, rule)([u.T @ d @ v for d in deltas], weights, **given) @ v.T
