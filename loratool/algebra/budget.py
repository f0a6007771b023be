"""Spending a global budget of parameters where it lowers the error most.

Component i of a matrix of shape (m, n) costs m + n parameters and lowers Σ‖D − D_r‖² by σᵢ².
Taken in the order of σ²/(m+n), as many as fit are optimal for the size they use (a Lagrange
multiplier), not for the budget; so what is left is filled in the same order with what still fits,
and the result is compared with a uniform rank. It misses the optimum by at most the first
component that did not fit. Small problems are solved exactly by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratool.algebra.spectrum import Spectrum

EXACT_WORK = 5_000_000
"""Up to this many steps of the dynamic programme."""


@dataclass(frozen=True)
class Allocation:
    """ranks: one per spectrum. used: parameters. loss: at most how much more of Σ‖D − D_r‖² is
    missed than the best allocation of this budget would; zero when solved exactly."""

    ranks: tuple[int, ...]
    used: int
    loss: float


def allocate(spectra: Sequence[Spectrum], parameters: int, *, relative: bool = False) -> Allocation:
    """Ranks that spend at most ``parameters`` on the resolved values of ``spectra``.

    relative: lower Σ‖D − D_r‖²/‖D‖² instead of Σ‖D − D_r‖².
    """
    costs = [sum(spectrum.shape) for spectrum in spectra]
    gains = [
        (s.values.square() / (s.total_energy if relative and s.total_energy else 1.0)).numpy()
        for s in spectra
    ]
    exact = _exact(gains, costs, parameters)
    if exact is not None:
        return Allocation(exact, _used(exact, costs), 0.0)
    greedy, first_left = _greedy(gains, costs, parameters)
    uniform = _uniform(gains, costs, parameters)
    best = max((greedy, uniform), key=lambda ranks: _gain(ranks, gains))
    return Allocation(best, _used(best, costs), first_left)


def _used(ranks: Sequence[int], costs: Sequence[int]) -> int:
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))


def _gain(ranks: Sequence[int], gains: Sequence[np.ndarray]) -> float:
    return sum(float(gain[:rank].sum()) for rank, gain in zip(ranks, gains, strict=True))


def _greedy(
    gains: Sequence[np.ndarray], costs: Sequence[int], parameters: int
) -> tuple[tuple[int, ...], float]:
    components = [
        (-value / cost, layer, index, value)
        for layer, (gain, cost) in enumerate(zip(gains, costs, strict=True))
        for index, value in enumerate(gain.tolist())
    ]
    ranks = [0] * len(gains)
    left, first_left = parameters, 0.0
    for _, layer, index, value in sorted(components):
        if index != ranks[layer]:
            continue  # an earlier component of this matrix did not fit
        if costs[layer] <= left:
            ranks[layer] += 1
            left -= costs[layer]
        elif not first_left:
            first_left = value
    return tuple(ranks), first_left


def _uniform(gains: Sequence[np.ndarray], costs: Sequence[int], parameters: int) -> tuple[int, ...]:
    rank = 0
    while True:
        larger = tuple(min(rank + 1, len(gain)) for gain in gains)
        if _used(larger, costs) > parameters or rank >= max((len(g) for g in gains), default=0):
            return tuple(min(rank, len(gain)) for gain in gains)
        rank += 1


def _exact(
    gains: Sequence[np.ndarray], costs: Sequence[int], parameters: int
) -> tuple[int, ...] | None:
    """Dynamic programming over the budget in units of the costs' greatest common divisor."""
    unit = math.gcd(*costs) if costs else 1
    size = parameters // unit
    if not costs or (size + 1) * sum(len(gain) + 1 for gain in gains) > EXACT_WORK:
        return None
    best = np.zeros(size + 1)
    choices = []
    for gain, cost in zip(gains, costs, strict=True):
        step = cost // unit
        options = np.concatenate([[0.0], gain.cumsum()])
        new, choice = best.copy(), np.zeros(size + 1, dtype=np.int64)
        for rank in range(1, len(options)):
            if rank * step > size:
                break
            value = best[: size + 1 - rank * step] + options[rank]
            better = value > new[rank * step :]
            new[rank * step :][better] = value[better]
            choice[rank * step :][better] = rank
        best = new
        choices.append(choice)
    ranks: list[int] = []
    position = size
    for choice, cost in zip(reversed(choices), reversed(costs), strict=True):
        rank = int(choice[position])
        ranks.append(rank)
        position -= rank * (cost // unit)
    return tuple(reversed(ranks))


def parse_size(text: str, bytes_per_value: int, base_values: int) -> int | None:
    """Parameters meant by ``500000``, ``20MB``, ``1.5GiB`` or ``2%`` (of the base's values).

    None when the text is none of these.
    """
    units = {
        "%": base_values / 100,
        "kb": 1e3 / bytes_per_value,
        "mb": 1e6 / bytes_per_value,
        "gb": 1e9 / bytes_per_value,
        "kib": 2**10 / bytes_per_value,
        "mib": 2**20 / bytes_per_value,
        "gib": 2**30 / bytes_per_value,
        "": 1.0,
    }
    number = text.strip().lower()
    unit = number.lstrip("0123456789.").strip()
    try:
        value = float(number.removesuffix(unit).strip())
    except ValueError:
        return None
    if unit not in units or not 0 < value < 1e18:
        return None
    return int(value * units[unit])
