"""Random numbers that depend on a key alone, so that order, threads and blocks do not matter."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def gaussian(rows: int, columns: int, key: str) -> Tensor:
    """(rows, columns) float32 standard normal numbers, a function of ``key`` (Philox counters)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(generator.standard_normal((rows, columns), dtype=np.float32))
