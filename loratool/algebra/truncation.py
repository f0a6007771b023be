"""Sums of low-rank updates, and cutting them by a rank rule, through the core.

The numerical rank is counted against the size of what was added up, not against what is left: the
sum of an update and its negative is then zero, and not rounding errors of full rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from loratool.algebra.factorize import left_signs
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankLimits, RankRule
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.thin_qr import thin_qr
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
    b = torch.cat([value.b for value in values], dim=1)
    a = torch.cat([value.a for value in values]).double()
    if len(scales) == 1:
        return LowRank(b.double(), a, scales.pop())
    each = [value.scale for value in values for _ in range(value.rank)]
    return LowRank(b * torch.tensor(each, dtype=torch.float64, device=b.device), a)


def truncate(value: LowRank, choose: Callable[[Spectrum], int]) -> Truncation:
    """The leading part of an update (Eckart–Young), as many components as ``choose`` says.

    ``choose`` sees the numerically nonzero singular values only, σ > (max(out, in) + r)·2⁻⁵² times
    the sum of |scale|·‖b_k‖·‖a_k‖, and may ask for more than there are. The largest entry of each
    left vector is positive. Costs O((out + in)·r² + r³).
    """
    one, two = thin_qr(value.b.double()), thin_qr(value.a.double().T)
    lengths = (torch.linalg.vector_norm(qr.r, dim=0) for qr in (one, two))
    size = abs(value.scale) * float(math.prod(lengths).sum())
    u, sigma, vh = torch.linalg.svd(value.scale * (one.r @ two.r.T), full_matrices=False)
    floor = (max(value.shape) + value.rank) * _EPSILON * size
    values = sigma[: int((sigma > floor).sum())]
    energy = float(values.square().cumsum(0)[-1]) if len(values) else 0.0
    spectrum = Spectrum(values.cpu(), energy, value.shape)
    rank = min(choose(spectrum), len(values)) if len(values) else 0
    left, right = one.q_times(u[:, :rank]), two.q_times(vh[:rank].T).T
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


def rounding(exact: LowRank, stored: LowRank) -> LowRank:
    """stored − exact, of two values with the same components and scale that differ by little.

    Its factors are as small as the difference, so that its norm is accurate relative to itself.
    """
    b, a = stored.b.double(), stored.a.double()
    off_b, off_a = b - exact.b.double(), a - exact.a.double()
    return LowRank(torch.cat([off_b, exact.b.double()], dim=1), torch.cat([a, off_a]), exact.scale)


def stored_error(exact: LowRank, cut: Truncation, off: LowRank) -> float:
    """‖exact − (cut + off)‖_F without a decomposition of the joint factors.

    off: what rounding did to the cut. With the rest E = exact − cut, ‖E‖² being the spectrum's
    tail, it is √(‖E‖² − 2⟨E, off⟩ + ‖off‖²).
    """
    tail = float(cut.spectrum.values[cut.value.rank :].square().sum())
    beside = exact.inner(off) - cut.value.inner(off)
    return math.sqrt(max(0.0, tail - 2 * beside + off.norm() ** 2))
