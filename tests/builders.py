"""Small files for tests: checkpoints, adapters, and files that lie.

Written with the safetensors library or by hand, never with loratool's own writers, so that a
reader and a writer that share a mistake do not agree with each other here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GPT2_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
}


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible normal values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def gpt2_weights(
    *, layers: int = 1, width: int = 8, vocabulary: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A GPT-2 by the names of GPT2LMHeadModel: Conv1D weights as (in, out), head tied."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (12, width),
    }
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes[f"{block}.{name}.weight"] = (rows, columns)
            shapes[f"{block}.{name}.bias"] = (columns,)
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}.{norm}.weight"] = (width,)
            shapes[f"{block}.{norm}.bias"] = (width,)
    shapes["transformer.ln_f.weight"] = (width,)
    shapes["transformer.ln_f.bias"] = (width,)
    return _filled(shapes, dtype)


def llama_weights(
    *, layers: int = 1, width: int = 8, vocabulary: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A Llama by the names of LlamaForCausalLM, with a head of its own."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 2, width),
            ("self_attn.v_proj", width // 2, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", 2 * width, width),
            ("mlp.up_proj", 2 * width, width),
            ("mlp.down_proj", width, 2 * width),
        ):
            shapes[f"{block}.{name}.weight"] = (rows, columns)
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocabulary, width)
    return _filled(shapes, dtype)


def _filled(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: random_tensor(*shape, seed=index, dtype=dtype)
        for index, (name, shape) in enumerate(shapes.items())
    }


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """model.safetensors, and config.json where there is a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(
    folder: Path,
    shards: Mapping[str, Mapping[str, Tensor]],
    *,
    index: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Shards by file name and the index that names them (or another index, to lie with)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file, {"format": "pt"})
    truth = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    text = json.dumps(truth if index is None else index)
    (folder / "model.safetensors.index.json").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora_factors(
    module: str,
    out: int,
    into: int,
    rank: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A and B of one linear module under PEFT's key names."""
    return {
        f"base_model.model.{module}.lora_A.weight": random_tensor(
            rank, into, seed=seed, dtype=dtype
        ),
        f"base_model.model.{module}.lora_B.weight": random_tensor(
            out, rank, seed=seed + 1, dtype=dtype
        ),
    }


def write_peft(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A PEFT adapter folder. r is taken from the first lora_A unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name]
    values = {"peft_type": "LORA", "r": ranks[0] if ranks else 1, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def write_raw_safetensors(
    path: Path, header: Mapping[str, Any] | bytes | str, data: bytes = b""
) -> Path:
    """A safetensors file with exactly this header, however wrong, and exactly these bytes."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    """One tensor's description in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def snapshot(folder: Path) -> dict[str, str]:
    """Everything under ``folder``: relative path → kind, or hash of a file's first megabyte."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read(2**20)).hexdigest()
            found[name] = f"{path.stat().st_size} {digest}"
        else:
            found[name] = "folder"
    return found


def relative_paths(folder: Path) -> list[str]:
    """Names of everything under ``folder``."""
    return list(snapshot(folder))
