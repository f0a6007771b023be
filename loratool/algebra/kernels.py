"""A compiled pass for merging, where numba is installed (extra ``fast``).

One loop over a block in cache replaces a dozen tensor operations. It makes the same decisions
from the same float32 operations in the same order, so it leaves the same positions open and gives
the same bytes as the plain version; tests hold the two together.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Decide = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, int, float]]

SWITCH = "LORATOOL_NO_NUMBA"
"""Set in the environment, it forbids the compiled pass."""


def decide_bf16() -> Decide | None:
    """The compiled pass for bf16 weights and results, or None where numba is missing."""
    return None if os.environ.get(SWITCH) else _compiled()


@cache
def _compiled() -> Decide | None:
    if importlib.util.find_spec("numba") is None:
        return None
    loop = _compile()

    def decide(
        w0: Tensor, product: Tensor, margin: Tensor, per_value: float
    ) -> tuple[Tensor, Tensor, int, float]:
        """w0: (rows, columns) bf16. product: float32. margin: (rows,) float32."""
        values = torch.empty_like(w0)
        open_ = np.empty(w0.numel(), dtype=np.int32)
        count, changed, largest = loop(
            w0.contiguous().view(torch.uint16).numpy(),
            product.numpy(),
            margin.numpy(),
            np.float32(per_value),
            values.view(torch.uint16).numpy(),
            open_,
        )
        top = torch.tensor([largest], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return values, torch.from_numpy(open_[:count].astype(np.int64)), int(changed), float(top)

    return decide


def _compile() -> Any:
    from numba import njit

    @njit(nogil=True, cache=True, fastmath=False)
    def loop(w0: Any, product: Any, margin: Any, per_value: Any, values: Any, open_: Any) -> Any:
        rows, columns = product.shape
        shift, half, one = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
        flags = np.empty(columns, np.uint8)
        count: Any = 0
        changed: Any = 0
        largest = np.uint16(0)
        for i in range(rows):
            row_margin = margin[i]
            flagged: Any = 0
            for j in range(columns):
                stored = w0[i, j]
                largest = max(largest, np.uint16(stored & np.uint16(0x7FFF)))
                start = np.uint32(np.uint32(stored) << shift).view(np.float32)
                estimate = np.float32(product[i, j] + start)
                bound = np.float32(np.float32(abs(start) * per_value) + row_margin)
                above = np.float32(estimate + bound).view(np.uint32)
                below = np.float32(estimate - bound).view(np.uint32)
                high = np.uint32(above + half + ((above >> shift) & one)) >> shift
                low = np.uint32(below + half + ((below >> shift) & one)) >> shift
                values[i, j] = np.uint16(high)
                flag = np.uint8(high != low)
                flags[j] = flag
                flagged += flag
                changed += np.uint16(high) != stored
            if flagged:
                for j in range(columns):
                    if flags[j]:
                        open_[count] = i * columns + j
                        count += 1
        return count, changed, largest

    return loop
