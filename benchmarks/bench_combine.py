"""Combining and resizing against the peers' algorithms, one weight matrix at a time.

Combining: PEFT's ``add_weighted_adapter(combination_type="svd")`` on a model of one linear layer
per matrix, as PEFT runs it by default (dense sum, full SVD). Resizing: kohya's resize_lora, which
multiplies the factors out and takes a dense SVD. Ours is what the commands run for one weight,
without reading and writing. Prints JSON; ``--quick`` only shows that the script works.

A rival's SVD of a long matrix takes minutes: by default only the square matrices of a layer are
timed for it, and the ratio is of those. ``--all-shapes`` times all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import median, note
from torch import Tensor, nn

from loratool.algebra.lowrank import LowRank
from loratool.algebra.truncation import rounding, stored_error, total, truncate

RANK = 16


def timed(work: Callable[[], Any], rounds: int) -> tuple[dict[str, float], Any]:
    """Median wall and processor seconds, and the last result."""
    walls, busy, result = [], [], None
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        walls.append(time.perf_counter() - wall)
        busy.append(time.process_time() - cpu)
    return {"seconds": median(walls), "cpu_seconds": median(busy)}, result


def factors(shape: tuple[int, int], seed: int, rank: int = RANK) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=generator)
    return LowRank(b, torch.randn(rank, shape[1], generator=generator), 2.0)


def shapes_of(width: int) -> list[tuple[int, int]]:
    """The different shapes of a Llama layer's linear modules."""
    inner = 256 * round(width * 8 / 3 / 256)
    return [(width, width), (inner, width), (width, inner)]


def ours_combined(values: list[LowRank]) -> LowRank:
    return ours_resized(total(values))


def ours_resized(exact: LowRank) -> LowRank:
    """The float32 factors, with their error measured, as the commands do."""
    cut = truncate(exact, lambda _: RANK)
    stored = LowRank(cut.value.b.float(), cut.value.a.float())
    stored_error(exact, cut, rounding(cut.value, stored))
    return stored


def error_of(exact: LowRank, found: LowRank) -> float:
    """‖exact − found‖ / ‖exact‖."""
    return total([exact, found * -1.0]).norm() / exact.norm()


def peft_combined(values: list[LowRank]) -> Callable[[], LowRank]:
    """PEFT's combination, ready to run; making the model is not timed."""
    from peft import LoraConfig, get_peft_model

    rows, columns = values[0].shape
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["layer"]}
    model = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False)}),
        LoraConfig(**settings),
        adapter_name="x0",
    )
    layer = model.base_model.model["layer"]
    for i, value in enumerate(values):
        if i:
            model.add_adapter(f"x{i}", LoraConfig(**settings))
        layer.lora_B[f"x{i}"].weight.data = value.b.clone()
        layer.lora_A[f"x{i}"].weight.data = value.a.clone()
    names = [f"x{i}" for i in range(len(values))]

    def run() -> LowRank:
        model.add_weighted_adapter(
            names, [1.0] * len(names), "all", combination_type="svd", svd_rank=RANK
        )
        result = LowRank(layer.lora_B["all"].weight.data, layer.lora_A["all"].weight.data)
        model.delete_adapter("all")
        return result

    return run


def kohya_resized(value: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """sd-scripts' networks/resize_lora.py, with a fixed rank."""
    u, s, vh = torch.linalg.svd((value.b @ value.a) * value.scale)
    return u[:, :rank] @ torch.diag(s[:rank]), vh[:rank]


def compare_combining(
    widths: list[int], counts: list[int], rounds: int, all_shapes: bool
) -> list[dict[str, Any]]:
    rows = []
    for width in widths:
        for count in counts:
            for shape in shapes_of(width):
                values = [factors(shape, seed) for seed in range(count)]
                exact = total(values)
                ours, found = timed(lambda v=values: ours_combined(v), rounds)
                row: dict[str, Any] = {"shape": shape, "adapters": count, "ours": ours}
                row["ours"]["error"] = error_of(exact, found)
                if all_shapes or shape[0] == shape[1]:
                    theirs, other = timed(peft_combined(values), 1)
                    theirs["error"] = error_of(exact, other)
                    row |= {"peft": theirs, "ratio": theirs["seconds"] / ours["seconds"]}
                note(f"combine {shape}, {count} adapters: {row.get('ratio', 0):.0f}×")
                rows.append(row)
    return rows


def compare_resizing(widths: list[int], rounds: int, all_shapes: bool) -> list[dict[str, Any]]:
    rows = []
    for width in widths:
        for shape in shapes_of(width):
            value = factors(shape, 1, 2 * RANK)
            ours, _ = timed(lambda v=value: ours_resized(v), rounds)
            row: dict[str, Any] = {"shape": shape, "from": 2 * RANK, "to": RANK, "ours": ours}
            if all_shapes or shape[0] == shape[1]:
                theirs, _ = timed(lambda v=value: kohya_resized(v, RANK), 1)
                row |= {"kohya": theirs, "ratio": theirs["seconds"] / ours["seconds"]}
            note(f"resize {shape}: {row.get('ratio', 0):.0f}×")
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all-shapes", action="store_true")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    widths, counts = ([256], [4]) if given.quick else ([2048, 4096], [4, 8])
    result = {
        "threads": torch.get_num_threads(),
        "combine": compare_combining(widths, counts, given.rounds, given.all_shapes),
        "resize": compare_resizing(widths, given.rounds, given.all_shapes),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
