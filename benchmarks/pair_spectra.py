"""``PAIR``: leading singular values of every change of a pair, against full decompositions.

Ours is what ``loratool inspect BASE TUNED`` computes, in a process that has started already:
reading both sides, norms, noise floors, 32 singular values of every matrix. The rival does what
weightwatcher 0.7.7 does on a CPU: all singular values of each change by LAPACK's gesdd in float64
(``W.astype(float)``; scipy's and numpy's are the same), one after the other, on all threads. A
sterner one does the same in float32, `torch.linalg.svdvals`. Both are timed on the first matrix of
each shape and scaled by how many there are (``--all``: on every one), and are not charged for
reading. The error is that of every
singular value that inspect prints of those matrices, against square roots of the eigenvalues of the
float64 Gram matrix. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import median, note, read_once

from loratool.algebra.blocks import float64_blocks
from loratool.ops.inspect_pair import DeltaRow, inspect_pair
from loratool.ops.sources import open_model

PART_BYTES = 2**22


def measure(pair: Path, rounds: int, *, every: bool) -> dict[str, Any]:
    """Seconds of ours, the rival's and of reading, and the errors."""
    base, tuned = pair / "base", pair / "tuned"
    for side in (base, tuned):
        read_once(side)
    files = sorted([*base.glob("*.safetensors"), *tuned.glob("*.safetensors")])
    inspect_pair(base, tuned, only=["layers.0"])  # whatever is loaded at first use
    ours, reading, rows = [], [], []
    for number in range(rounds):
        reading.append(_timed(lambda: _read(files)))
        start = time.perf_counter(), time.process_time()
        rows = inspect_pair(base, tuned, device="cpu").matrices
        ours.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        note(f"spectra {number + 1}/{rounds}: {ours[-1][0]:.1f} s")
    by_shape: dict[tuple[int, ...], list[DeltaRow]] = defaultdict(list)
    for row in rows:
        by_shape[row.shape].append(row)
    full, single = (0.0, 0.0), (0.0, 0.0)
    shapes, worst_top, worst = [], 0.0, 0.0
    for shape, same in by_shape.items():
        wide, narrow = [], []
        for row in same if every else same[:1]:
            d = _change(base, tuned, row.name)
            narrow.append(_timed(lambda d=d: torch.linalg.svdvals(d)))  # type: ignore[misc]
            exact = d.numpy().astype(float)
            wide.append(
                _timed(lambda d=exact: np.linalg.svd(d, compute_uv=False))  # type: ignore[misc]
            )
            top, others = _errors(row, d)
            worst_top, worst = max(worst_top, top), max(worst, others)
        full, each = _added(full, wide, len(same))
        single, each_single = _added(single, narrow, len(same))
        shapes.append(
            {
                "shape": shape,
                "matrices": len(same),
                "timed": len(wide),
                "svd_seconds": each,
                "svd_seconds_float32": each_single,
            }
        )
        note(f"full decomposition of {'×'.join(map(str, shape))}: {each:.1f}, {each_single:.1f} s")
    seconds, busy = median(wall for wall, _ in ours), median(cpu for _, cpu in ours)
    read = median(wall for wall, _ in reading)
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "matrices": len(rows),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": busy,
        "svd_seconds": full[0],
        "svd_cpu_seconds": full[1],
        "svd_seconds_float32": single[0],
        "ratio_float32": single[0] / seconds,
        "read_seconds": read,
        "ratio": full[0] / seconds,
        "cpu_ratio": full[1] / busy,
        "over_reading": seconds / read,
        "shapes": shapes,
        "checked": sum(shape["timed"] for shape in shapes),
        "values": max(len(row.spectrum.values) for row in rows if row.spectrum),
        "worst_error_of_largest": worst_top,
        "worst_error": worst,
    }


def _added(
    so_far: tuple[float, float], times: list[tuple[float, float]], count: int
) -> tuple[tuple[float, float], float]:
    """Wall and processor seconds with those of ``count`` matrices more; wall seconds of one."""
    wall, busy = (sum(side) / len(times) for side in zip(*times, strict=True))
    return (so_far[0] + wall * count, so_far[1] + busy * count), wall


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def _read(files: list[Path]) -> None:
    buffer = bytearray(PART_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _change(base: Path, tuned: Path, name: str) -> torch.Tensor:
    before, after = (open_model(side).checkpoint.tensors[name].read() for side in (base, tuned))
    return after.float() - before.float()


def _errors(row: DeltaRow, d: torch.Tensor) -> tuple[float, float]:
    """Relative error of the largest value, and the largest relative error of all printed."""
    assert row.spectrum is not None
    tall = d if d.shape[0] >= d.shape[1] else d.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for _, block in float64_blocks(tall):
        gram.addmm_(block.T, block)
    true = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()[: len(row.spectrum.values)]
    errors = ((row.spectrum.values - true).abs() / true).tolist()
    return errors[0], max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path, help="a folder made by make_pair.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="decompose every matrix in full")
    given = parser.parse_args()
    print(json.dumps(measure(given.pair, given.rounds, every=given.all)))


if __name__ == "__main__":
    main()
