"""``BASE TUNED RANK``: what any certified extraction must spend on this pair, and no more.

Reading every byte of both sides once; and for each linear layer one float32 product with D and
one with Dᵀ, rank + 8 columns each (a randomised method cannot do with less), and one float64
product of the factors (the stated error). Both on all cores, one BLAS thread each, in buffers that
are there already. Prints JSON: the seconds of both parts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loratool.algebra.blocks import block_rows
from loratool.algebra.krylov import OVERSAMPLING
from loratool.engine import Engine, NoProgress
from loratool.ops.sources import open_model

PART_BYTES = 2**22


def main() -> None:
    base, tuned, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    files = sorted([*base.glob("*.safetensors"), *tuned.glob("*.safetensors")])
    shapes = [
        info.shape
        for name, info in open_model(base).checkpoint.tensors.items()
        if name.endswith("proj.weight")
    ]
    reading = seconds(_read, files, lambda file: file.stat().st_size)
    stock = torch.randn(max(rows * columns for rows, columns in shapes))
    products = seconds(
        lambda shape: _multiply(stock, shape, rank), shapes, lambda shape: shape[0] * shape[1]
    )
    print(json.dumps({"read": reading, "products": products}))


def seconds(work: Callable[[Any], None], jobs: list[Any], cost: Callable[[Any], int]) -> float:
    """Of all jobs on the engine; the second time counts."""
    for _ in range(2):
        start = time.perf_counter()
        Engine().map(work, jobs, cost=cost, progress=NoProgress(), what="floor")
        spent = time.perf_counter() - start
    return spent


def _read(file: Path) -> None:
    buffer = bytearray(PART_BYTES)
    with open(file, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass


def _multiply(stock: torch.Tensor, shape: tuple[int, ...], rank: int) -> None:
    rows, columns = shape
    d = stock[: rows * columns].view(rows, columns)
    width = rank + OVERSAMPLING
    image = stock[: width * columns].view(width, columns) @ d.T
    image @ d
    b, a = (stock[: rank * side].view(side, rank).double() for side in (rows, columns))
    step = block_rows(columns)
    out = torch.empty(step, columns, dtype=torch.float64)
    for start in range(0, rows, step):
        part = b[start : start + step]
        torch.mm(part, a.T, out=out[: len(part)])


if __name__ == "__main__":
    main()
