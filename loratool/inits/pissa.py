"""PiSSA: the weight's principal part is trained, the rest is frozen."""

from __future__ import annotations

from torch import Tensor

from loratool.algebra.factorize import leading_triplets
from loratool.algebra.lowrank import LowRank
from loratool.inits.method import Init, Start


def pissa(weight: Tensor, start: Start) -> LowRank:
    """B = U·√Σ and A = √Σ·Vᵀ of the leading r singular triplets, such that s·B·A is their sum."""
    u, values, v = leading_triplets(weight, start.rank, key=start.key)
    root = (values / start.scale).sqrt().to(u)
    return LowRank(u * root, (v * root).T, start.scale)


PISSA = Init("pissa", "Meng et al. 2024, PiSSA, arXiv 2404.02948, equations 2–4", from_weight=pissa)
