"""Fitting DoRA (Liu et al., 2024, arXiv 2402.09353, eq. 5) to a change.

The adapted weight is m_i · V_i / ‖V_i‖ by rows, V = W0 + B·A. With m_i = ‖W_i‖ its rows have
the tuned weight's norms, and only directions are left to fit: V_i may be any multiple of W_i, so
each row has a free factor g_i > 0,

    V = diag(1/g) · (diag(g)·W0 + L),   L of rank r,   B·A = diag(1/g)·L,

and the merged row misses W_i by about what diag(g)·W0 + L does, less what the norm puts right.
So ‖W − diag(g)·W0 − L‖_F is lowered over L and g in turn: L is the best rank-r matrix for given g
(Eckart and Young), g_i the projection of (W − L)_i on W0_i for given L. Starting from g = 1, where
L is what LoRA would store, no step makes it worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.algebra.blocks import float64_blocks
from loratool.algebra.factorize import Factors
from loratool.algebra.lowrank import LowRank

SWEEPS = 8
"""At most."""

WORTHWHILE = 0.01
"""Another sweep follows if new row factors lower what is missed by this share of its energy."""

_LEAST = 1 / 16
"""Of a row factor: rows that turned away from the base's have to be fitted by L."""


@dataclass(frozen=True)
class DoraFit:
    """value: B·A, scale 1, float32. first: the factors of W − W0 itself; last: those of the last
    sweep, which ``value`` is made from. sweeps: how many there were."""

    value: LowRank
    first: Factors
    last: Factors
    sweeps: int


def fit_dora(
    w0: Tensor, w: Tensor, d: Tensor, factorise: Callable[[Tensor], Factors]
) -> DoraFit | None:
    """B and A for the tuned weight ``w`` (m, n) on the base ``w0``; None where they have rank 0.

    d: w − w0. factorise: the components of a matrix that the rank rule keeps. All float32; sums
    in float64.
    """
    g = torch.ones(w.shape[0], dtype=torch.float64, device=w.device)
    squares = row_norms(w0).square()
    first = fitted = factorise(d)
    sweeps, rest = 1, d
    while fitted.rank:
        missed, along = _missed(rest, fitted.low_rank(), w0)
        step = torch.where(squares > 0, along / squares.clamp(min=1e-300), 0.0)
        step = (g + step).clamp(min=_LEAST) - g
        g = g + step
        gained = float((step * (2 * along - step * squares)).sum())
        if gained <= WORTHWHILE * missed or sweeps == SWEEPS:
            product = fitted.low_rank()
            value = LowRank((product.b.double() / g[:, None]).float(), product.a)
            return DoraFit(value, first, fitted, sweeps)
        rest = _without(w, w0, g)
        fitted = factorise(rest)
        sweeps += 1
    return None


def row_norms(w: Tensor) -> Tensor:
    """‖w_i‖ of each row of (m, n), float64."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for _, rows in float64_blocks(w)])


def dora_residual_norm(w0: Tensor, w: Tensor, value: LowRank, magnitude: Tensor) -> float:
    """‖W − m·V/‖V‖‖_F with factors and magnitudes as stored: all in float64, block by block.

    A row of V that is zero gives NaN, as it does in the merge.
    """
    a, b = value.a.double() * value.scale, value.b.double()
    missed = []
    for start, rows in float64_blocks(w0):
        stop = start + len(rows)
        v = rows.addmm_(b[start:stop], a)
        factor = magnitude[start:stop].double() / torch.linalg.vector_norm(v, dim=1)
        v.mul_(factor[:, None]).sub_(w[start:stop])
        missed.append(float(v.square_().sum()))
    return float(math.fsum(missed) ** 0.5)


def _missed(rest: Tensor, product: LowRank, w0: Tensor) -> tuple[float, Tensor]:
    """‖E‖² and ⟨E_i, W0_i⟩ by row, of E = rest − B·A."""
    a, b = product.a.double(), product.b.double()
    energy, along = [], []
    for start, rows in float64_blocks(rest):
        stop = start + len(rows)
        error = rows.addmm_(b[start:stop], a, alpha=-1)
        along.append((error * w0[start:stop]).sum(dim=1))
        energy.append(float(error.square_().sum()))
    return math.fsum(energy), torch.cat(along)


def _without(w: Tensor, w0: Tensor, g: Tensor) -> Tensor:
    """W − diag(g)·W0, rounded once to float32."""
    rest = torch.empty_like(w)
    for start, rows in float64_blocks(w0):
        stop = start + len(rows)
        rest[start:stop] = rows.mul_(-g[start:stop, None]).add_(w[start:stop])
    return rest
