"""Random numbers that depend on a key alone, so that order, threads and blocks do not matter."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def gaussian(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32 standard normal numbers, a function of ``key`` (Philox counters)."""
    return torch.from_numpy(_generator(key).standard_normal((rows, columns), dtype=np.float32))


def uniform(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32, the middles of 256 equal parts of [−1, 1] with equal chances, a
    function of ``key``. All of them are bfloat16 numbers too.

    As good as Gaussian numbers for a start, and made in a third of the time. (Signs are not: two
    rows of them are often equal, and what lies in the difference of two rows is lost then.)
    """
    drawn = np.frombuffer(_generator(key).bytes(rows * columns), dtype=np.int8)
    numbers = torch.from_numpy(drawn.astype(np.float32))
    return numbers.add_(0.5).mul_(2.0**-7).view(rows, columns)


def choose(total: int, count: int, key: str) -> Tensor:
    """``count`` different numbers below ``total``, ascending, a function of ``key``; int64."""
    return torch.from_numpy(np.sort(_generator(key).choice(total, size=count, replace=False)))


def _generator(key: str) -> np.random.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed))
