"""Uniform numbers for the elements of a matrix, each a function of key and place alone.

SplitMix64 (Steele, Lea and Flood 2014) of the element's index, started at a hash of the key: any
block of the matrix can be made by itself, in any order, on any device, with the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BITS = 53


def uniform(start: int, stop: int, columns: int, key: str, device: torch.device) -> Tensor:
    """Rows ``start:stop`` of a matrix with this many columns: float64 in [0, 1)."""
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    index = torch.arange(start * columns, stop * columns, dtype=torch.int64, device=device)
    state = (index + 1) * _signed(_STEP) + _signed(first)
    for shift, factor in _MIX:
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 64 - _BITS).double() * 2.0**-_BITS).reshape(stop - start, columns)


def _signed(value: int) -> int:
    """The 64 bits of ``value`` as a signed number: int64 products wrap as unsigned ones do."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
