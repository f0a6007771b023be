"""Sums of low-rank updates, and cutting them by a rank rule, through the core.

The numerical rank is counted against the size of what was added up, not against what is left: the
sum of an update and its negative is then zero, and not rounding errors of full rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratool.algebra.factorize import left_signs
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankLimits, RankRule
from loratool.algebra.spectrum import Spectrum
from loratool.errors import ShapeMismatch

_EPSILON = 2.0**-52


@dataclass(frozen=True)
class Truncation:
    """value: the best approximation of its rank, float64, balanced, scale 1.

    spectrum: all numerically nonzero singular values of what was cut.
    """

    value: LowRank
    spectrum: Spectrum


def total(values: Sequence[LowRank]) -> LowRank:
    """The exact sum, of rank Σr, with the scales in float64 factors.

    Where all scales are equal the scale stays outside and the factors are as they were. Raises
    ShapeMismatch.
    """
    shapes = {value.shape for value in values}
    if len(shapes) != 1:
        raise ShapeMismatch(f"cannot add updates of shapes {sorted(shapes)}")
    scales = {value.scale for value in values}
    a = torch.cat([value.a.double() for value in values])
    if len(scales) == 1:
        return LowRank(torch.cat([value.b.double() for value in values], dim=1), a, scales.pop())
    return LowRank(torch.cat([value.b.double() * value.scale for value in values], dim=1), a)


def truncate(value: LowRank, choose: Callable[[Spectrum], int]) -> Truncation:
    """The leading part of an update (Eckart–Young), as many components as ``choose`` says.

    ``choose`` sees the numerically nonzero singular values only, σ > (max(out, in) + r)·2⁻⁵² times
    the sum of |scale|·‖b_k‖·‖a_k‖, and may ask for more than there are. The largest entry of each
    left vector is positive. Costs O((out + in)·r² + r³).
    """
    b, a = _balanced(value)
    size = float(b.square().sum().sqrt() * a.square().sum().sqrt())
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    floor = (max(value.shape) + value.rank) * _EPSILON * size
    values = sigma[: int((sigma > floor).sum())]
    energy = float(values.square().cumsum(0)[-1]) if len(values) else 0.0
    spectrum = Spectrum(values.cpu(), energy, value.shape)
    rank = min(choose(spectrum), len(values)) if len(values) else 0
    left, right = q_b @ u[:, :rank], vh[:rank] @ q_a.T
    signs = left_signs(left)
    root = values[:rank].sqrt()
    return Truncation(LowRank(left * (root * signs), (root * signs)[:, None] * right), spectrum)


def wanted_rank(rule: RankRule, spectrum: Spectrum) -> int:
    """The rank that a rule asks for, given all numerically nonzero values of a low-rank matrix.

    Limits apply: a fixed number, or a multiple, can be more than there are values.
    """
    if rule.kind.name == "fixed":
        return rule.first_guess(spectrum.shape)
    rank = replace(rule, limits=RankLimits())(replace(spectrum, cut=True))
    if rank is None:  # every value is kept, and the rest of the matrix is zero
        rank = len(spectrum.values)
    return rule.limits.apply(rank, spectrum.shape)


def difference_norm(one: LowRank, two: LowRank) -> float:
    """‖one − two‖_F, to float64 accuracy relative to the larger of the two."""
    return total([one, two * -1.0]).norm()


def _balanced(value: LowRank) -> tuple[Tensor, Tensor]:
    """Factors with the scale inside and the two sides of each component about equally long.

    Components are scaled by powers of two, which rounds nothing.
    """
    b, a = value.b.double() * value.scale, value.a.double()
    lengths = torch.linalg.vector_norm(b, dim=0), torch.linalg.vector_norm(a, dim=1)
    usable = (lengths[0] > 0) & (lengths[1] > 0)
    ratio = torch.where(usable, lengths[1] / lengths[0].clamp(min=math.ulp(0.0)), 1.0)
    factor = torch.exp2((ratio.log2() / 2).round())
    return b * factor, a / factor[:, None]
