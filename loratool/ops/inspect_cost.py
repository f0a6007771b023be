"""What an adapter of a checkpoint costs at given ranks: to keep, to merge, to extract.

From headers alone. Bytes and operations follow from shapes. Seconds are those of a simple model:
operations over the speed of thin products, which is measured here for a few milliseconds, plus
bytes that are moved over the speed of copying. Files are taken to be in the page cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loratool.adapter import ModuleKind
from loratool.algebra.cost import extract_flops, lora_parameters, merge_flops
from loratool.engine import Engine
from loratool.errors import UnsupportedInput, UsageError
from loratool.layouts.targets import targeted
from loratool.ops.deltas import matrix_shape
from loratool.ops.merge_inputs import IN_FLOAT32, working_memory
from loratool.storage.tensors import TensorInfo

TARGETS = "all-linear"
EXTRACT_TRAFFIC = 60
"""Bytes moved per weight beside the products: both sides read, subtracted, squared in float64, and
the noise floor."""
_SIDE = 3072
_FEWEST_BITS = 16
"""Of an adapter's value, also where the weight has fewer."""
_FLOAT64_COSTS = 2
"""A product in float64, against one in float32."""


@dataclass(frozen=True)
class Speed:
    """Of one core, a second: operations in thin float32 products, bytes copied."""

    flops: float
    copied: float


@dataclass(frozen=True)
class Work:
    """A merge or an extraction. peak_bytes: working memory, beside Python and torch themselves."""

    read_bytes: int
    written_bytes: int
    flops: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class CostRow:
    """At one rank, limited by each matrix's smaller side."""

    rank: int
    parameters: int
    adapter_bytes: int
    merge: Work
    extract: Work

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "merge": dict(vars(self.merge)), "extract": dict(vars(self.extract))}


@dataclass(frozen=True)
class Costs:
    """By rank, of adapters on the matrices that ``targets`` means."""

    targets: str
    matrices: int
    workers: int
    speed: Speed
    rows: tuple[CostRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "targets": self.targets,
            "matrices": self.matrices,
            "workers": self.workers,
            "flops_per_second": self.speed.flops,
            "copied_per_second": self.speed.copied,
            "ranks": [row.to_json() for row in self.rows],
        }


def parse_ranks(text: str) -> tuple[int, ...]:
    """``"8,16"`` → (8, 16). Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 and int(word) for word in words):
        raise UsageError(f"--cost {text}: needs ranks, such as 8 or 8,16,64")
    return tuple(int(word) for word in words)


def costs(
    tensors: Mapping[str, TensorInfo],
    kinds: Mapping[str, ModuleKind],
    ranks: Sequence[int],
    *,
    engine: Engine | None = None,
    speed: Speed | None = None,
) -> Costs:
    """Of adapters of these ranks on every linear layer but output heads.

    speed: of the machine, where it is known. Raises NothingMatches for a checkpoint without linear
    layers, and UnsupportedInput for one whose weights are packed, so that shapes tell nothing;
    UsageError for a rank below 1.
    """
    if min(ranks) < 1:
        raise UsageError(f"rank {min(ranks)} is not positive")
    workers = (engine or Engine()).workers
    speed = speed or measured_speed()
    names = targeted(TARGETS, kinds)
    chosen = [info for name, info in tensors.items() if name in names]
    for info in chosen:
        if not info.dtype.is_float and info.dtype.name != "I8":
            raise UnsupportedInput(
                f"{info.name}: is {info.dtype.name} of shape {list(info.shape)}, which need not be "
                "the shape of the weight that is packed in it",
                hint="name the checkpoint that it was quantised from",
            )
    total = sum(info.nbytes for info in tensors.values())
    rows = tuple(_row(rank, chosen, total, workers, speed) for rank in ranks)
    return Costs(TARGETS, len(chosen), workers, speed, rows)


def _row(
    rank: int, chosen: Sequence[TensorInfo], total: int, workers: int, speed: Speed
) -> CostRow:
    shapes = [matrix_shape(info.shape) for info in chosen]
    factors = [lora_parameters([shape], rank) for shape in shapes]
    bits = [max(_FEWEST_BITS, info.dtype.bits) for info in chosen]
    adapter = sum(count * each // 8 for count, each in zip(factors, bits, strict=True))
    weights = sum(info.numel for info in chosen)
    flops = merge_flops(shapes, rank)
    merge_traffic = 2 * total + IN_FLOAT32 * weights
    merge = Work(
        total + adapter,
        total,
        flops,
        working_memory(IN_FLOAT32, 4 * max(factors), workers),
        (flops / speed.flops + merge_traffic / speed.copied) / workers,
    )
    single, double = extract_flops(shapes, rank)
    largest = sorted((info.numel for info in chosen), reverse=True)[:workers]
    seconds = (single + _FLOAT64_COSTS * double) / speed.flops
    extract = Work(
        2 * total,
        adapter,
        single + double,
        2 * 4 * sum(largest),
        (seconds + EXTRACT_TRAFFIC * weights / speed.copied) / workers,
    )
    return CostRow(rank, sum(factors), adapter, merge, extract)


def measured_speed() -> Speed:
    """Of one core of this machine, on a matrix too large for its caches."""
    matrix, thin = (
        torch.zeros(rows, _SIDE, dtype=torch.float32, device="cpu") for rows in (_SIDE, 40)
    )
    target = torch.empty_like(matrix)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _quickest(lambda: thin @ matrix)
        copy = _quickest(lambda: target.copy_(matrix))
    finally:
        torch.set_num_threads(threads)
    flops = 2 * matrix.numel() * thin.shape[0]
    return Speed(flops / product, 2 * matrix.nbytes / copy)


def _quickest(work: Callable[[], object]) -> float:
    """Seconds of this thread in the quickest of some runs, whatever else the machine does."""
    times = []
    for _ in range(4):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return max(min(times), 1e-9)
