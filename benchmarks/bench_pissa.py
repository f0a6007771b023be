"""PiSSA initialisation: ``loratool init`` of a whole model against PEFT's of single matrices.

PEFT takes a full singular value decomposition of every matrix, which for the model of run_all.py
takes far longer than ten minutes. So one matrix of each shape is given to PEFT, and its seconds are
multiplied by how many there are. Only its initialisation counts; ours is the whole command,
start-up, reading and writing of adapter and residual base included.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from measure import loratool, median, note, python, read_once, run

RANK = 16
LAYER = "model.layers.0"
SAMPLES = {
    "self_attn.q_proj": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp.up_proj": ("gate_proj", "up_proj", "down_proj"),
}
"""Matrices that PEFT is timed on, and those of a layer that each stands for."""


def compare_pissa(model: Path, rounds: int) -> dict[str, Any]:
    """PEFT's matrices after the first of our runs; medians of ours, captured energy, ratios."""
    base = model / "base"
    config = json.loads((base / "config.json").read_text())
    layers = config["num_hidden_layers"]
    read_once(base)
    ours, theirs = [], {}
    report: dict[str, Any] = {}
    for number in range(rounds):
        done, report = _ours(model)
        ours.append(done)
        note(f"pissa: ours {number + 1}/{rounds}: {done[0]:.1f} s")
        if number == 0:
            theirs = {name: _theirs(base, name) for name in SAMPLES}
    kept = {row["name"]: row["energy_kept"] for row in report["modules"]}
    peft = sum(layers * len(alike) * theirs[name]["seconds"] for name, alike in SAMPLES.items())
    cpu = sum(layers * len(alike) * theirs[name]["cpu_seconds"] for name, alike in SAMPLES.items())
    seconds, busy, peak = (median(values) for values in zip(*ours, strict=True))
    return {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "layers": layers,
        "rank": RANK,
        "rounds": rounds,
        "bytes": sum(file.stat().st_size for file in base.glob("*.safetensors")),
        "matrices": len(kept),
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_bytes": peak,
        "peft_seconds": peft,
        "peft_cpu_seconds": cpu,
        "ratio": peft / seconds,
        "cpu_ratio": cpu / busy,
        "samples": [
            {
                "module": name,
                "stands_for": layers * len(alike),
                **theirs[name],
                "captured": kept[f"{LAYER}.{name}.weight"] / theirs[name]["optimum"],
            }
            for name, alike in SAMPLES.items()
        ],
    }


def _ours(model: Path) -> tuple[tuple[float, float, float], dict[str, Any]]:
    start, residual = model / "start", model / "residual"
    for folder in (start, residual):
        shutil.rmtree(folder, ignore_errors=True)
    options = ["--method", "pissa", "--residual", residual, "--rank", str(RANK), "--device", "cpu"]
    words = loratool("init", model / "base", "-o", start, *options, "-q", "--json")
    done = run(words, flush=residual)
    report: dict[str, Any] = done.json()
    for folder in (start, residual):
        shutil.rmtree(folder)
    return (done.seconds, done.cpu_seconds, done.peak_bytes), report


def _theirs(base: Path, name: str) -> dict[str, float]:
    done = run(python("peft_pissa.py", base, f"{LAYER}.{name}", str(RANK)))
    note(f"pissa: PEFT on {name}: {done.seconds:.1f} s")
    figures: dict[str, float] = done.json()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder made by make_pair.py --decaying")
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    given = parser.parse_args()
    print(json.dumps(compare_pissa(given.model, given.rounds), indent=1))


if __name__ == "__main__":
    main()
