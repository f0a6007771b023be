"""The paper's start: A random, B zero, so that ΔW = 0 exactly."""

from __future__ import annotations

import torch

from loratool.algebra.counter import uniform
from loratool.algebra.lowrank import LowRank
from loratool.algebra.random import gaussian as normal
from loratool.inits.method import Init, Start


def gaussian(start: Start) -> LowRank:
    """A from a normal distribution with standard deviation 1/r, as PEFT has it."""
    return _with_zero_b(start, normal(start.rank, start.shape[1], start.key) / start.rank)


def kaiming(start: Start) -> LowRank:
    """A uniform within ±1/√in, as the paper's code and PEFT's default have it."""
    unit = uniform(0, start.rank, start.shape[1], start.key, torch.device("cpu"))
    return _with_zero_b(start, ((2 * unit - 1) / start.shape[1] ** 0.5).float())


def _with_zero_b(start: Start, a: torch.Tensor) -> LowRank:
    return LowRank(torch.zeros(start.shape[0], start.rank, dtype=torch.float32), a, start.scale)


GAUSSIAN = Init(
    "gaussian", "Hu et al. 2022, LoRA, arXiv 2106.09685, section 4.1; PEFT's gaussian", gaussian
)
KAIMING = Init(
    "kaiming",
    "loralib and PEFT's default: He et al. 2015, arXiv 1502.01852, with a = √5",
    kaiming,
)
