"""A large matrix a block of rows at a time, in float64, through one buffer that stays in cache.

The buffer is the point: memory that is asked for and given back for every block costs many times
what is computed with it, since the system hands it out page by page.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 4 * 2**20


def block_rows(columns: int) -> int:
    """Rows per block such that a float64 block stays in cache."""
    return max(16, _BLOCK_BYTES // (8 * max(columns, 1)))


def float64_blocks(d: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block of ``d`` (m, n), and its rows in float64.

    The rows may be changed in place; they are valid until the next block.
    """
    rows, columns = d.shape
    step = min(block_rows(columns), max(rows, 1))
    buffer = torch.empty(step, columns, dtype=torch.float64, device=d.device)
    for start in range(0, rows, step):
        part = d[start : start + step]
        yield start, buffer[: part.shape[0]].copy_(part)


def all_finite(d: Tensor) -> bool:
    """Whether ``d`` holds neither NaN nor infinity; torch.isfinite would make copies of it."""
    return d.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(d))


def large_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix; on the CPU in large pages where the system has them.

    Half the time of a difference would go into handing out small pages otherwise: numpy asks for
    large ones, torch does not.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    raw = np.empty(rows * columns * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(rows, columns)
