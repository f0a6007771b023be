"""Combining and resizing against the peers' algorithms, one Llama layer's linear modules at a time.

Combining: PEFT's ``add_weighted_adapter(combination_type="svd")`` on a model of one linear layer
per matrix, as PEFT runs it by default (dense sum, full SVD). Resizing: kohya's resize_lora, which
multiplies the factors out and takes a dense SVD. Ours is what the commands run for each weight,
its error measured, on the commands' engine, without reading and writing.

A layer has four square matrices, two that are long and one that is wide. Ours runs all seven. The
rival runs one of each shape, once, and its seconds count four, two and one times. Prints JSON;
``--quick`` only shows that the script works.
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
from loratool.engine import Engine, NoProgress

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


def layer_of(width: int) -> list[tuple[tuple[int, int], int]]:
    """The shapes of a Llama layer's linear modules, with how many there are of each."""
    inner = 256 * round(width * 8 / 3 / 256)
    return [((width, width), 4), ((inner, width), 2), ((width, inner), 1)]


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


def all_ours(work: Callable[[Any], LowRank], jobs: list[Any]) -> list[LowRank]:
    """A layer's matrices as the commands run them: side by side, one BLAS thread each."""
    return Engine().map(work, jobs, cost=lambda _: 1, progress=NoProgress(), what="")


def compare_layer(
    width: int,
    values: Callable[[tuple[int, int]], Any],
    ours: Callable[[Any], LowRank],
    exact: Callable[[Any], LowRank],
    theirs: Callable[[Any], Callable[[], LowRank]],
    rounds: int,
) -> dict[str, Any]:
    """Seconds and errors of one layer. theirs: makes the rival's work, ready to be timed."""
    shapes = layer_of(width)
    inputs = [values(shape) for shape, count in shapes for _ in range(count)]
    row: dict[str, Any] = {"width": width}
    row["ours"], found = timed(lambda: all_ours(ours, inputs), rounds)
    firsts = [sum(count for _, count in shapes[:i]) for i in range(len(shapes))]
    rival, errors = {"seconds": 0.0, "cpu_seconds": 0.0}, []
    for (shape, count), place in zip(shapes, firsts, strict=True):
        seconds, other = timed(theirs(inputs[place]), 1)
        note(f"{shape}: rival {seconds['seconds']:.1f} s")
        rival = {key: rival[key] + count * seconds[key] for key in rival}
        target = exact(inputs[place])
        errors.append((error_of(target, found[place]), error_of(target, other)))
    row["ours"]["error"], rival["error"] = (max(column) for column in zip(*errors, strict=True))
    row |= {"rival": rival, "ratio": rival["seconds"] / row["ours"]["seconds"]}
    note(f"width {width}: {row['ratio']:.0f}×")
    return row


def compare_combining(widths: list[int], counts: list[int], rounds: int) -> list[dict[str, Any]]:
    return [
        {"adapters": count}
        | compare_layer(
            width,
            lambda shape, n=count: [factors(shape, seed) for seed in range(n)],
            ours_combined,
            total,
            peft_combined,
            rounds,
        )
        for width in widths
        for count in counts
    ]


def compare_resizing(widths: list[int], rounds: int) -> list[dict[str, Any]]:
    return [
        {"from": 2 * RANK, "to": RANK}
        | compare_layer(
            width,
            lambda shape: factors(shape, 1, 2 * RANK),
            ours_resized,
            lambda value: value,
            lambda value: lambda: LowRank(*kohya_resized(value, RANK)),
            rounds,
        )
        for width in widths
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    widths, counts = ([256], [4]) if given.quick else ([2048, 4096], [4, 8])
    result = {
        "threads": torch.get_num_threads(),
        "combine": compare_combining(widths, counts, given.rounds),
        "resize": compare_resizing(widths, given.rounds),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
