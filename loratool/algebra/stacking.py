"""Updates beside each other in one: their factors side by side, at one scale."""

from __future__ import annotations

import math

import torch

from loratool.algebra.lowrank import LowRank


def at_scale(value: LowRank, scale: float) -> LowRank:
    """The same matrix with another scale, not zero; the factors share what that takes."""
    if scale == value.scale:
        return value
    share = value.scale / scale
    root = math.sqrt(abs(share))
    return LowRank(value.b * math.copysign(root, share), value.a * root, scale)


def stacked(first: LowRank, second: LowRank) -> LowRank:
    """The exact sum, of rank r₁ + r₂, at the scale of ``first``, whose factors stay as they are.

    float32 unless ``first`` is wider.
    """
    second = at_scale(second, first.scale)
    dtype = torch.promote_types(first.b.dtype, torch.float32)
    b = torch.cat([first.b.to(dtype), second.b.to(dtype)], dim=1)
    a = torch.cat([first.a.to(dtype), second.a.to(dtype)])
    return LowRank(b, a, first.scale)
