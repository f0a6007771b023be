"""PEFT's ``init_lora_weights="pissa"`` of one linear layer: seconds, and the energy it captures
beside the most that its rank could.

Prints one JSON document. The layer's weight is read before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open


def weight_of(base: Path, module: str) -> torch.Tensor:
    """The module's weight, as stored."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = f"{module}.weight"
    with safe_open(base / index["weight_map"][name], framework="pt") as file:
        weight: torch.Tensor = file.get_tensor(name)
    return weight


def initialise(weight: torch.Tensor, rank: int) -> dict[str, float]:
    """PEFT's initialisation of a model that is this one layer."""
    out, into = weight.shape
    layer = torch.nn.Linear(into, out, bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    model = torch.nn.Sequential()
    model.add_module("layer", layer)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights="pissa"
    )
    wall, busy = time.perf_counter(), time.process_time()
    inject_adapter_in_model(config, model)
    seconds, cpu = time.perf_counter() - wall, time.process_time() - busy
    b = model.layer.lora_B["default"].weight.detach().double()
    a = model.layer.lora_A["default"].weight.detach().double()
    whole = weight.double()
    missed = float((whole - b @ a).square().sum())
    energy = float(whole.square().sum())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "energy_kept": 1 - missed / energy,
        "optimum": best_share(whole, rank),
    }


def best_share(matrix: torch.Tensor, rank: int) -> float:
    """Σ of the ``rank`` largest σ², as a share of all; by eigenvalues of the Gram matrix, float64.

    What is stored of an SVD's factors is rounded, so PEFT's own figure is not quite the most.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    energies = torch.linalg.eigvalsh(tall.T @ tall)
    return float(energies[-rank:].sum() / energies.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("module")
    parser.add_argument("rank", type=int)
    given = parser.parse_args()
    print(json.dumps(initialise(weight_of(given.base, given.module), given.rank)))


if __name__ == "__main__":
    main()
