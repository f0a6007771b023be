"""Sums of doubles without error, in bulk: products split exactly, sums by repeated TwoSum sweeps.

Dekker (1971) for the product, Ogita, Rump and Oishi (2005), algorithm VecSum, for the sum.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_U = 2.0**-53
_MAX_SWEEPS = 12
_SPLITTER = 2.0**27 + 1


def two_product(x: np.ndarray, y: np.ndarray | np.float64) -> list[np.ndarray]:
    """``x · y`` as an unevaluated sum of two arrays, without error (Dekker's TwoProduct)."""
    high = x * y
    x_high, x_low = _split(x)
    y_high, y_low = _split(y)
    low = ((x_high * y_high - high) + x_high * y_low + x_low * y_high) + x_low * y_low
    return [high, low]


def _split(values: np.ndarray | np.float64) -> tuple[np.ndarray, np.ndarray]:
    scaled = values * _SPLITTER
    high = scaled - (scaled - values)
    return np.asarray(high), np.asarray(values - high)


def sum_rounded_to_odd(addends: np.ndarray) -> np.ndarray:
    """Column sums of (K, N) doubles, exact where representable, else rounded to odd.

    Rounding to odd keeps, in 53 bits, which side of every narrower rounding boundary the exact
    sum lies on.
    """
    result = np.empty(addends.shape[1])
    active = np.arange(addends.shape[1])
    terms = addends
    for _ in range(_MAX_SWEEPS):
        if not len(active):
            return result
        terms = _two_sum_sweep(terms)
        head, rest = terms[-1], terms[:-1]
        size = np.abs(rest).sum(axis=0)
        tail = rest.sum(axis=0)
        certain = np.abs(tail) > size * (2 * len(rest) * _U)
        done = (size == 0) | (certain & (head + tail == head))
        result[active[done]] = _to_odd(head[done], np.sign(tail[done]))
        active, terms = active[~done], terms[:, ~done]
    for index, column in zip(active, terms.T, strict=True):
        result[index] = fraction_to_odd(sum((Fraction(float(x)) for x in column), Fraction(0)))
    return result


def _two_sum_sweep(terms: np.ndarray) -> np.ndarray:
    """One VecSum pass: the same exact sum, with its leading part collected in the last row."""
    swept = np.empty_like(terms)
    head = terms[0]
    for index in range(1, len(terms)):
        total = head + terms[index]
        part = total - head
        swept[index - 1] = (head - (total - part)) + (terms[index] - part)
        head = total
    swept[-1] = head
    return swept


def _to_odd(head: np.ndarray, side: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(head).view(np.int64)
    inward = (side != 0) & (side * np.sign(head) < 0)
    return np.where(side != 0, (bits - inward) | 1, bits).view(np.float64)


def fraction_to_odd(value: Fraction) -> float:
    """A rational as a double: exact where representable, else rounded to odd."""
    nearest = float(value)
    side = (value > Fraction(nearest)) - (value < Fraction(nearest))
    return float(_to_odd(np.array([nearest]), np.array([float(side)]))[0])
