"""A large matrix a block of rows at a time, in float64, through one buffer that stays in cache.

The buffer is the point: memory that is asked for and given back for every block costs many times
what is computed with it, since the system hands it out page by page.
"""

from __future__ import annotations

import sys
import threading
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
    large ones, torch does not. A worker's thread keeps the last one for its next job.
    """
    if device.type != "cpu" or not rows * columns:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    raw = _KEPT.bytes(rows * columns * dtype.itemsize, dtype)
    return torch.from_numpy(raw).view(dtype).view(rows, columns)


class _Kept(threading.local):
    """The last large piece of memory that a worker's thread had, of each dtype, for as long as the
    thread lives.

    The main thread lives too long for that, and keeps none.
    """

    def __init__(self) -> None:
        self._raw: dict[torch.dtype, np.ndarray] = {}

    def bytes(self, count: int, dtype: torch.dtype) -> np.ndarray:
        """Those kept, if nothing looks at them and they are enough and not far too many, else new
        ones."""
        if threading.current_thread() is threading.main_thread():
            return np.empty(count, dtype=np.uint8)
        if dtype in self._raw:
            if sys.getrefcount(self._raw[dtype]) > _REFERENCES:
                return np.empty(count, dtype=np.uint8)
            if count <= len(self._raw[dtype]) <= 2 * count:
                return self._raw[dtype][:count]
            del self._raw[dtype]  # given back before more is asked for
        self._raw[dtype] = np.empty(count, dtype=np.uint8)
        return self._raw[dtype][:]


_REFERENCES = 2
"""What sys.getrefcount says of a value of a dictionary that nobody else has."""

_KEPT = _Kept()
