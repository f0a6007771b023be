"""Random numbers that depend on a key alone, so that order, threads and blocks do not matter."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def gaussian(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32 standard normal numbers, a function of ``key`` (Philox counters)."""
    return torch.from_numpy(_generator(key).standard_normal((rows, columns), dtype=np.float32))


def signs(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32, +1 or −1 with equal chances, a function of ``key``.

    As good as Gaussian numbers for a start, and made in a tenth of the time.
    """
    count = rows * columns
    drawn = np.frombuffer(_generator(key).bytes(-(-count // 8)), dtype=np.uint8)
    bits = torch.from_numpy(np.unpackbits(drawn, count=count))
    return bits.float().mul_(2).sub_(1).view(rows, columns)


def choose(total: int, count: int, key: str) -> Tensor:
    """``count`` different numbers below ``total``, ascending, a function of ``key``; int64."""
    return torch.from_numpy(np.sort(_generator(key).choice(total, size=count, replace=False)))


def _generator(key: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed))
