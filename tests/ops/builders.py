"""Checkpoints written with the safetensors library and torch, not with loratool."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]


MIXTURE = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "tie_word_embeddings": False,
}


def llama_like(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> State:
    """Names and orientation of a small Llama, 2-D weights of different shapes and norms."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.1).to(dtype)

    state = {"model.embed_tokens.weight": matrix(50, 24)}
    for i in range(layers):
        state |= {
            f"model.layers.{i}.self_attn.q_proj.weight": matrix(24, 24),
            f"model.layers.{i}.self_attn.k_proj.weight": matrix(12, 24),
            f"model.layers.{i}.mlp.up_proj.weight": matrix(40, 24),
            f"model.layers.{i}.mlp.down_proj.weight": matrix(24, 40),
            f"model.layers.{i}.input_layernorm.weight": matrix(1, 24)[0],
        }
    state["model.norm.weight"] = matrix(1, 24)[0]
    state["lm_head.weight"] = matrix(50, 24)
    return state


def gpt2_like(dtype: torch.dtype = torch.float32, seed: int = 0, prefix: str = "") -> State:
    """GPT-2's names: Conv1D (in, out), a square c_proj among them, biases, tied head absent."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    state = {"wte.weight": values(40, 16), "wpe.weight": values(8, 16)}
    for i in range(2):
        state |= {
            f"h.{i}.ln_1.weight": values(16),
            f"h.{i}.ln_1.bias": values(16),
            f"h.{i}.attn.c_attn.weight": values(16, 48),
            f"h.{i}.attn.c_attn.bias": values(48),
            f"h.{i}.attn.c_proj.weight": values(16, 16),
            f"h.{i}.attn.c_proj.bias": values(16),
            f"h.{i}.mlp.c_fc.weight": values(16, 64),
            f"h.{i}.mlp.c_fc.bias": values(64),
        }
    state |= {"ln_f.weight": values(16), "ln_f.bias": values(16)}
    return {prefix + name: value for name, value in state.items()}


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "tie_word_embeddings": True,
}


def mixture_like(seed: int = 0, experts: int = 4) -> State:
    """Experts of one layer, stored one by one, and their router."""
    generator = torch.Generator().manual_seed(seed)
    block = "model.layers.0.mlp"
    state = {f"{block}.gate.weight": torch.randn(experts, 16, generator=generator)}
    shapes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    for expert in range(experts):
        for part, shape in shapes.items():
            name = f"{block}.experts.{expert}.{part}.weight"
            state[name] = torch.randn(*shape, generator=generator)
    return state


def save_folder(
    state: State, folder: Path, config: dict[str, object] | None = None, shards: int = 1
) -> Path:
    """A checkpoint folder as transformers lays it out."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_folder(folder: Path) -> State:
    """All tensors of a folder, by the safetensors library."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def moved(state: State, size: float = 0.01, seed: int = 9, rank: int | None = None) -> State:
    """Every tensor changed by noise; with ``rank``, matrices by a low-rank update instead."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in state.items():
        if rank and value.ndim == 2:
            b = torch.randn(value.shape[0], rank, generator=generator)
            a = torch.randn(rank, value.shape[1], generator=generator)
            step = b @ a * size
        else:
            step = torch.randn(value.shape, generator=generator) * size
        result[name] = (value.float() + step).to(value.dtype)
    return result


def save_peft(folder: Path, factors: dict[str, tuple[Tensor, Tensor]], **config: object) -> Path:
    """A PEFT adapter folder: module → (lora_A (r, in), lora_B (out, r))."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[0].shape[0]
    settings: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({module.split(".")[-1] for module in factors}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder
