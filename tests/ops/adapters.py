"""Adapters to combine and resize, and what they do to a model, through PEFT's own rules."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.builders import lora_factors, random_tensor, write_peft

MODULES = {
    "model.layers.0.self_attn.q_proj": (20, 24),
    "model.layers.0.mlp.up_proj": (40, 24),
    "model.layers.1.self_attn.q_proj": (20, 24),
    "model.layers.1.mlp.up_proj": (40, 24),
}


def adapter(
    path: Path,
    rank: int = 4,
    seed: int = 0,
    modules: dict[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    **config: object,
) -> Path:
    """A PEFT adapter on MODULES. extra: further tensors by their full key."""
    tensors = {}
    for index, (module, (out, into)) in enumerate((modules or MODULES).items()):
        tensors |= lora_factors(module, out, into, rank, seed=seed + 10 * index, dtype=dtype)
    return write_peft(path, tensors | (extra or {}), **config)


def convolution(path: Path, rank: int = 3, seed: int = 0) -> Path:
    tensors = {
        "base_model.model.unet.conv.lora_A.weight": random_tensor(rank, 5, 3, 3, seed=seed),
        "base_model.model.unet.conv.lora_B.weight": random_tensor(8, rank, 1, 1, seed=seed + 1),
    }
    return write_peft(path, tensors)


def updates(folder: Path) -> dict[str, Tensor]:
    """ΔW of every module as (out, in·k…), float64, read by hand with PEFT's scaling rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?A(?:\.weight)?", key):
            b = tensors[key.replace("_A", "_B")]
            rank = patterned(config, "rank_pattern", match[1], config["r"])
            alpha = patterned(config, "alpha_pattern", match[1], config["lora_alpha"])
            assert rank == a.shape[0], "PEFT could not load this"
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            found[match[1]] = scale * (b.flatten(1).double() @ a.flatten(1).double())
    return found


def patterned(config: dict[str, object], which: str, module: str, default: float) -> float:
    patterns = config.get(which) or {}
    assert isinstance(patterns, dict)
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def ranks(folder: Path) -> dict[str, int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: value.shape[0] for key, value in tensors.items() if "lora_A" in key}
