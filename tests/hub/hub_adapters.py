"""A small PEFT adapter with its extraction report, written without loratool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BASE = "openai-community/gpt2"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
REPORT = "loratool_report.json"
TARGETS = {"attn.c_attn": (24, 8), "mlp.c_fc": (32, 8)}
NORM = "transformer.ln_f.weight"


def make_adapter(folder: Path, *, base: str | None = BASE, **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {f"base_model.model.{NORM}": torch.ones(8)}
    for (module, (rows, columns)), rank in zip(TARGETS.items(), (4, 2), strict=True):
        prefix = f"base_model.model.transformer.h.0.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"mlp.c_fc": 2},
        "alpha_pattern": {"mlp.c_fc": 2},
        "target_modules": ["c_attn", "c_fc"],
        "modules_to_save": ["ln_f"],
        "fan_in_fan_out": True,
        **config,
    }
    (folder / CONFIG).write_text(json.dumps(values))
    (folder / REPORT).write_text(json.dumps(make_report()))
    return folder


def make_report() -> dict[str, Any]:
    def row(name: str, kind: str, status: str, norm: float, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "shape": [8, 8],
            "status": status,
            "delta_norm": norm,
        } | more

    return {
        "schema": "loratool/extract/1",
        "command": "extract",
        "version": "0.1.0",
        "rank": "energy:0.95",
        "dtype": "F32",
        "seed": 0,
        "base": {"name": "gpt2"},
        "tuned": {"name": "my-tuned"},
        "tensors": [
            row(
                "transformer.h.0.attn.c_attn.weight",
                "conv1d",
                "low-rank",
                3.0,
                rank=4,
                relative_error=0.1,
            ),
            row(
                "transformer.h.0.mlp.c_fc.weight",
                "conv1d",
                "low-rank",
                4.0,
                rank=2,
                relative_error=0.25,
            ),
            row(NORM, "norm", "stored whole", 0.5, relative_error=0.0),
            row("transformer.wpe.weight", "position table", "dropped", 1.0),
            row("transformer.wte.weight", "embedding", "unchanged", 0.0),
        ],
    }
