"""``BASE TUNED RANK``: as many workers as cores with one BLAS thread each, against one with all.

Prints JSON: the seconds of extraction without start-up, by "workers×threads". The output goes to
a temporary folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from loratool.engine import Engine, threads
from loratool.ops.extract import run_extract
from loratool.ops.extract_plan import plan_extract


def main() -> None:
    base, tuned, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert cores is not None
    result: dict[str, float] = {}
    settle = threads._settle_thread
    for round_number in range(3):
        for workers, blas in ((cores, 1), (1, cores)):
            # the engine gives every worker one thread; here that is what is compared
            threads._settle_thread = settle if blas == 1 else partial(torch.set_num_threads, blas)
            with tempfile.TemporaryDirectory() as folder:
                plan = plan_extract(
                    base, tuned, Path(folder) / "a", rank=rank, device="cpu", targets="all-linear"
                )
                start = time.perf_counter()
                run_extract(plan, Engine(workers))
                spent = time.perf_counter() - start
            if round_number:  # the first warms up
                key = f"{workers}×{blas}"
                result[key] = min(spent, result.get(key, spent))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
