"""Extraction: one matrix against a full SVD (time and error), and the whole command."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from measure import loratool, median, note, python, read_once, run

SHAPES = ((2048, 2048), (2048, 5632), (4096, 4096))
LARGEST = (4096, 11008)
DECAYS = (
    "1/i",
    "1/i, stored in bf16",
    "1/√i",
    "2^(−i/8)",
    "no decay: Gaussian noise",
)


def compare_times(shapes: tuple[tuple[int, int], ...], rounds: int) -> list[dict[str, Any]]:
    """Ours and torch.linalg.svd at the same thread count: one thread, then all."""
    results = []
    for threads in sorted({1, usable_cores()}):
        for rows, columns in shapes:
            command = python("matrix_svd.py", str(rows), str(columns))
            done = run([*command, "--threads", str(threads), "--rounds", str(rounds)])
            results.append(done.json())
            note(f"extract {rows}×{columns}, {threads} threads: {done.seconds:.0f} s")
    return results


def compare_errors(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Excess error over the optimum for several spectra."""
    note(f"errors at {shape}")
    command = python("matrix_svd.py", str(shape[0]), str(shape[1]))
    return [run([*command, "--errors", decay]).json() for decay in DECAYS]


def whole_command(pair: Path, rounds: int) -> dict[str, Any]:
    """``loratool extract`` of a whole pair, warm cache, its output on the disk at the end."""
    read_once(pair / "base")
    read_once(pair / "tuned")
    out = pair / "out"
    command = loratool("extract", pair / "base", pair / "tuned", "-o", out, "--rank", "16")
    runs = []
    for number in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(run([*command, "--device", "cpu", "-q"]))
        note(f"extract {number + 1}/{rounds} whole pair: {runs[-1].seconds:.1f} s")
    shutil.rmtree(out, ignore_errors=True)
    files = [*(pair / "base").glob("*.safetensors"), *(pair / "tuned").glob("*.safetensors")]
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "rounds": rounds,
        "seconds": median(done.seconds for done in runs),
        "cpu_seconds": median(done.cpu_seconds for done in runs),
        "peak_bytes": median(done.peak_bytes for done in runs),
    }


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path, help="a folder made by make_pair.py")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--largest", action="store_true", help="also 4096×11008")
    given = parser.parse_args()
    shapes = (*SHAPES, LARGEST) if given.largest else SHAPES
    result = {
        "times": compare_times(shapes, given.rounds),
        "errors": compare_errors((2048, 2048)),
        "whole": whole_command(given.pair, given.rounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
