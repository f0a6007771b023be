"""One matrix: what ``loratool extract`` computes for it, against a full SVD of the same delta.

Prints one JSON document. The delta is what two bf16 checkpoints differ by: singular values falling
as 1/i, plus the rounding of the tuned weights. Times are taken in turns; the optimum comes from
eigenvalues of a float64 Gram matrix, untimed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from make_pair import RELATIVE_CHANGE, decaying_matrix
from measure import median
from torch import Tensor

from loratool.algebra.factorize import factorize, residual_norm
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import parse_rank_rule

RANKS = (16, 64)
NEGLIGIBLE = 1e-2
NOISE = "no decay: Gaussian noise"
DECAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "1/i": lambda i: 1 / i,
    "1/i, stored in bf16": lambda i: 1 / i,
    "1/√i": lambda i: i.rsqrt(),
    "2^(−i/8)": lambda i: torch.exp2(-i / 8),
    NOISE: torch.ones_like,
}


def compare_times(shape: tuple[int, int], threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of both sides at one thread count, medians of ``rounds`` and of their ratios."""
    torch.set_num_threads(threads)
    d = delta(shape, "1/i, stored in bf16")
    ours: dict[int, list[tuple[float, float]]] = {rank: [] for rank in RANKS}
    full = []
    ours_once(d, RANKS[0])
    for _ in range(rounds):
        for rank in RANKS:
            repeats = [_times(partial(ours_once, d, rank)) for _ in range(3)]
            ours[rank].append((median(t[0] for t in repeats), median(t[1] for t in repeats)))
        full.append(_times(lambda: torch.linalg.svd(d, full_matrices=False)))
    return {
        "shape": shape,
        "threads": threads,
        "rounds": rounds,
        "svd_seconds": median(wall for wall, _ in full),
        "ranks": {
            str(rank): {
                "seconds": median(wall for wall, _ in ours[rank]),
                "ratio": median(f[0] / o[0] for f, o in zip(full, ours[rank], strict=True)),
                "cpu_ratio": median(f[1] / o[1] for f, o in zip(full, ours[rank], strict=True)),
            }
            for rank in RANKS
        },
    }


def ours_once(d: Tensor, rank: int) -> tuple[LowRank, LowRank, float]:
    """What extract does: float32 factors, those stored in bf16, and the measured error."""
    value = factorize(d, parse_rank_rule(str(rank)), key="0:matrix").low_rank()
    stored = LowRank(value.b.bfloat16(), value.a.bfloat16())
    return value, stored, residual_norm(d, stored)


def compare_errors(shape: tuple[int, int], decay: str) -> dict[str, Any]:
    """Errors relative to the delta's norm, and the excess over the best of the same rank."""
    d = delta(shape, decay)
    small = d if shape[0] >= shape[1] else d.T
    wide = small.double()
    energies = torch.linalg.eigvalsh(wide.T @ wide).clamp(min=0)
    norm = float(energies.sum().sqrt())
    result: dict[str, Any] = {"shape": shape, "decay": decay, "ranks": {}}
    for rank in RANKS:
        best = float(energies[:-rank].sum().sqrt()) / norm
        value, stored, stored_error = ours_once(d, rank)
        error = residual_norm(d, value) / norm
        rounding = LowRank(
            torch.cat([value.b, -stored.b.float()], dim=1),
            torch.cat([value.a, stored.a.float()], dim=0),
        ).norm()
        result["ranks"][str(rank)] = {
            "optimum": best,
            "excess": (error - best) / (best if best >= NEGLIGIBLE else 1.0),
            "excess_is_of_norm": best < NEGLIGIBLE,
            "storage_rounding": rounding / norm,
            "stored_excess": (stored_error / norm - best) / (best if best >= NEGLIGIBLE else 1.0),
        }
    return result


def delta(shape: tuple[int, int], decay: str) -> Tensor:
    """A float32 difference with the given decay, 2 % of weights of standard deviation 0.02."""
    values = DECAYS[decay](torch.arange(1, min(shape) + 1, dtype=torch.float64))
    size = RELATIVE_CHANGE * 0.02 * (shape[0] * shape[1]) ** 0.5
    values *= size / float(values.square().sum().sqrt())
    if decay == NOISE:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        return noise * (RELATIVE_CHANGE * 0.02)
    d = decaying_matrix(shape, values, f"{shape}")
    if "stored" not in decay:
        return d
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    return (base.float() + d).bfloat16().float() - base.float()


def _times(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("columns", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--errors", choices=list(DECAYS), help="errors instead of times")
    given = parser.parse_args()
    shape = (given.rows, given.columns)
    if given.errors:
        print(json.dumps(compare_errors(shape, given.errors)))
    else:
        print(json.dumps(compare_times(shape, given.threads, given.rounds)))


if __name__ == "__main__":
    main()
