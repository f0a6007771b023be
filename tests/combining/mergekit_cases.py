"""What mergekit is asked for, and what of ours must give the same.

Imports nothing of the package, so that ``data/make_mergekit.py`` can use it in an
environment that has mergekit and not loratool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHAPE = (24, 20)
"""480 elements: densities below are whole numbers of them, and exact in float32."""
RANKS = (2, 5, 3)
DENSITY = 0.375
FILE = "mergekit.safetensors"


@dataclass(frozen=True)
class Case:
    """theirs: mergekit's method with its parameters. base: what plays the base model: nothing
    ("none"), a model of zeros ("zeros"), or the first update ("first")."""

    name: str
    theirs: str
    given: dict[str, Any]
    ours: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = (0.75, 0.5, 1.25)
    base: str = "zeros"


CASES = (
    Case("linear", "linear", {}, "linear", base="none"),
    Case("task_arithmetic", "task_arithmetic", {"lambda": 0.5}, "task_arithmetic", {"lambda": 0.5}),
    Case("ties", "ties", {"density": DENSITY}, "ties", {"density": DENSITY}),
    Case(
        "ties_sum",
        "ties",
        {"density": DENSITY, "normalize": False, "lambda": 2.0},
        "ties",
        {"density": DENSITY, "normalize": False, "lambda": 2.0},
        (0.75, -0.5, 1.25),
    ),
    Case(
        "dare_linear",
        "dare_linear",
        {"density": DENSITY, "rescale": False, "lambda": 1 / DENSITY},
        "dare_linear",
        {"density": DENSITY},
    ),
    Case(
        "dare_ties",
        "dare_ties",
        {"density": DENSITY, "rescale": False, "lambda": 1 / DENSITY},
        "dare_ties",
        {"density": DENSITY},
    ),
    Case(
        "breadcrumbs",
        "breadcrumbs",
        {"density": 0.625, "gamma": 0.125},
        "breadcrumbs",
        {"density": 0.625, "gamma": 0.125},
    ),
    Case("sce", "sce", {}, "sce", {}, (1.0, 1.0, 1.0)),
    Case("sce_selected", "sce", {"select_topk": 0.5}, "sce", {"density": 0.5}, (1.0, 1.0, 1.0)),
    Case("slerp", "slerp", {"t": 0.3}, "slerp", {"t": 0.3}, (1.0, 1.0), "first"),
    Case("nuslerp", "nuslerp", {}, "nuslerp", {}, (0.75, 0.5)),
    Case("multislerp", "multislerp", {}, "multislerp", {}, base="none"),
    Case("karcher", "karcher", {"max_iter": 50}, "karcher", {"max_iter": 50}, (1.0,) * 3, "none"),
    Case("model_stock", "model_stock", {}, "model_stock", {}, (1.0, 1.0, 1.0)),
    Case("nearswap", "nearswap", {"t": 0.4}, "nearswap", {"t": 0.4}, (1.0, 1.0), "first"),
)

WEIGHTLESS = ("sce", "slerp", "karcher", "model_stock", "nearswap")
"""mergekit's methods that take no weight."""


def factors() -> list[tuple[Tensor, Tensor]]:
    """B and A of three updates that have a part in common, or no cosine would be far from 0."""
    generator = torch.Generator().manual_seed(7)
    shared_b = torch.randn(SHAPE[0], 1, generator=generator)
    shared_a = torch.randn(1, SHAPE[1], generator=generator)
    found = []
    for rank in RANKS:
        b = torch.randn(SHAPE[0], rank, generator=generator)
        a = torch.randn(rank, SHAPE[1], generator=generator)
        found.append((torch.cat([shared_b, b], 1), torch.cat([shared_a, a])))
    return found


def matrices() -> list[Tensor]:
    """The updates multiplied out, in float64 with values of float32 as the dense rules see them."""
    return [(b.double() @ a.double()).float().double() for b, a in factors()]
