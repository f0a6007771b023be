"""A compiled pass for merging, where numba is installed (extra ``fast``).

One loop over a block in cache replaces a dozen tensor operations. It makes the same decisions
from the same float32 operations in the same order, so it leaves the same positions open and gives
the same bytes as the plain version; tests hold the two together.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
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


def decide_bf16_when_loaded() -> Decide | None:
    """The same, without waiting: None until numba has been loaded in the background.

    Which of the two passes decides a block makes no difference to the result.
    """
    if os.environ.get(SWITCH):
        return None
    loading = _loading()
    return loading.result() if loading.done() else None


@cache
def _loading() -> Future[Decide | None]:
    future: Future[Decide | None] = Future()

    def load() -> None:
        try:
            future.set_result(_compiled())
        except Exception as error:  # whoever asks for the pass hears of it
            future.set_exception(error)

    threading.Thread(target=load, daemon=True).start()
    return future


@cache
def _compiled() -> Decide | None:
    if importlib.util.find_spec("numba") is None:
        return None
    loop = _compile()

    def decide(
        w0: Tensor, estimate: Tensor, margin: Tensor, per_value: float
    ) -> tuple[Tensor, Tensor, int, float]:
        """w0: (rows, columns) bf16. estimate: float32. margin: (rows,) float32."""
        values = torch.empty_like(w0)
        open_ = np.empty(w0.numel(), dtype=np.int32)
        count, changed, largest = loop(
            w0.contiguous().view(torch.uint16).numpy(),
            estimate.numpy(),
            margin.numpy(),
            np.float32(per_value),
            values.view(torch.uint16).numpy(),
            open_,
        )
        top = torch.tensor([largest], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return values, torch.from_numpy(open_[:count].astype(np.int64)), int(changed), float(top)

    one = torch.zeros(1, 1, dtype=torch.bfloat16)
    decide(one, one.float(), one[0].float(), 0.0)  # compiles it, or loads it from numba's cache
    return decide


def _compile() -> Any:
    from numba import njit

    @njit(nogil=True, cache=True, fastmath=False)
    def loop(w0: Any, estimate: Any, margin: Any, per_value: Any, values: Any, open_: Any) -> Any:
        rows, columns = estimate.shape
        shift, half, one = np.uint32(16), np.uint32(0x7FFF), np.uint32(1)
        flags = np.empty(columns, np.uint8)
        count: Any = 0
        changed: Any = 0
        largest = np.uint16(0)
        for i in range(rows):
            row_margin = margin[i]
            flagged: Any = 0
            for j in range(columns):
                largest = max(largest, np.uint16(w0[i, j] & np.uint16(0x7FFF)))
                value = estimate[i, j]
                bound = np.float32(np.float32(abs(value) * per_value) + row_margin)
                above = np.float32(value + bound).view(np.uint32)
                below = np.float32(value - bound).view(np.uint32)
                high = np.uint32(above + half + ((above >> shift) & one)) >> shift
                low = np.uint32(below + half + ((below >> shift) & one)) >> shift
                values[i, j] = np.uint16(high)
                flag = np.uint8(high != low)
                flags[j] = flag
                flagged += flag
                changed += np.uint16(high) != w0[i, j]
            if flagged:
                for j in range(columns):
                    if flags[j]:
                        open_[count] = i * columns + j
                        count += 1
        return count, changed, largest

    return loop
