"""PiSSA: the weight's principal part is trained, the rest is frozen."""

from __future__ import annotations

from torch import Tensor

from loratool.algebra.factorize import factorize
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule
from loratool.inits.method import Init, Start


def pissa(weight: Tensor, start: Start) -> LowRank:
    """B = U·√Σ and A = √Σ·Vᵀ of the leading r singular triplets, such that s·B·A is their sum."""
    factors = factorize(weight, parse_rank_rule(str(start.rank)), key=start.key)
    value = factors.low_rank()
    share = start.scale**-0.5
    return LowRank(value.b * share, value.a * share, start.scale)


PISSA = Init("pissa", "Meng et al. 2024, PiSSA, arXiv 2404.02948, equations 2–4", from_weight=pissa)
