"""Checkpoints to measure on: a Llama-shaped base, a tuned one, and a LoRA adapter for the base.

The weights are random, the shapes and names are those of a real model, and what is tuned has a
real delta's character: singular values falling as 1/i, then stored in bf16, whose rounding adds
a flat tail. Every tensor is a function of its name alone, so that files are the same each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

COMPONENTS = 256
RELATIVE_CHANGE = 0.02
ADAPTER_RANK, ADAPTER_ALPHA = 16, 32
LINEARS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


@dataclass(frozen=True)
class Shape:
    """The size of a Llama model with as many key heads as query heads."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the model."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield from self.linears(layer)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def linears(self, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
        for module, part in LINEARS.items():
            outputs = self.intermediate if module in ("gate_proj", "up_proj") else self.hidden
            inputs = self.intermediate if module == "down_proj" else self.hidden
            yield f"model.layers.{layer}.{part}.{module}.weight", (outputs, inputs)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def make_decaying(folder: Path, shape: Shape) -> Path:
    """Make ``folder`` with a base whose weights have leading directions, unless it is complete."""
    done = folder / "complete-decaying"
    if not done.exists():
        _save_checkpoint(folder / "base", shape, decaying_tensor)
        done.touch()
    return folder


def make(folder: Path, shape: Shape, *, with_tuned: bool = True) -> Path:
    """Make ``folder`` with base, adapter and tuned in it, unless it is complete already."""
    complete = folder / "complete"
    done = complete if with_tuned else folder / "complete-without-tuned"
    if not (done.exists() or complete.exists()):
        _save_checkpoint(folder / "base", shape, base_tensor)
        _save_adapter(folder / "adapter", shape)
        if with_tuned:
            _save_checkpoint(folder / "tuned", shape, tuned_tensor)
        done.touch()
    return folder


def base_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The base's weight, bf16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=_random(name)).mul_(0.02).bfloat16()


def decaying_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight of the base's size, bf16, half of whose energy lies in COMPONENTS directions.

    Their singular values fall as 1/√i; the other half is noise.
    """
    if len(shape) == 1:
        return base_tensor(name, shape)
    noise = base_tensor(name, shape).float().mul_(0.5**0.5)
    random = _random(f"directions of {name}")
    decay = torch.arange(1, COMPONENTS + 1).rsqrt()
    left = torch.randn(shape[0], COMPONENTS, generator=random) * decay
    right = torch.randn(COMPONENTS, shape[1], generator=random)
    size = 0.02 * 0.5**0.5 / float(decay.square().sum().sqrt())
    return noise.addmm_(left, right, alpha=size).bfloat16()


def tuned_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tuned weight, bf16: the base's plus a change with singular values falling as 1/i."""
    base = base_tensor(name, shape).float()
    random = _random(f"change of {name}")
    if len(shape) == 1:
        return base.add_(torch.randn(shape, generator=random), alpha=RELATIVE_CHANGE).bfloat16()
    decay = torch.arange(1, COMPONENTS + 1).reciprocal()
    left = torch.randn(shape[0], COMPONENTS, generator=random) * decay
    right = torch.randn(COMPONENTS, shape[1], generator=random)
    size = RELATIVE_CHANGE * 0.02 / float(decay.square().sum().sqrt())
    return base.addmm_(left, right, alpha=size).bfloat16()


def decaying_matrix(shape: tuple[int, int], values: Tensor, key: str) -> Tensor:
    """A dense float32 matrix with exactly the given min(shape) singular values."""
    rows, columns = shape
    left = torch.linalg.qr(torch.randn(rows, min(shape), generator=_random(f"left {key}"))).Q
    right = torch.linalg.qr(torch.randn(columns, min(shape), generator=_random(f"right {key}"))).Q
    matrix: Tensor = (left * values.float()) @ right.T
    return matrix


def _save_checkpoint(
    folder: Path, shape: Shape, value: Callable[[str, tuple[int, ...]], Tensor]
) -> None:
    """Two shards of about the same size, one in memory at a time, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(shape.tensors())
    total = 2 * sum(math.prod(size) for size in tensors.values())
    weight_map, seen = {}, 0
    for name, size in tensors.items():
        weight_map[name] = f"model-0000{1 if seen < total / 2 else 2}-of-00002.safetensors"
        seen += 2 * math.prod(size)
    for file in sorted(set(weight_map.values())):
        names = [name for name in tensors if weight_map[name] == file]
        shard = {name: value(name, tensors[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))


def _save_adapter(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    factors = {}
    size = RELATIVE_CHANGE * 0.02 * ADAPTER_RANK / ADAPTER_ALPHA / ADAPTER_RANK**0.5
    for layer in range(shape.layers):
        for name, (outputs, inputs) in shape.linears(layer):
            module, random = (
                f"base_model.model.{name.removesuffix('.weight')}",
                _random(f"A {name}"),
            )
            a = torch.randn(ADAPTER_RANK, inputs, generator=random)
            b = torch.randn(outputs, ADAPTER_RANK, generator=random) * size
            factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"] = a, b
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": ADAPTER_RANK,
        "lora_alpha": ADAPTER_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LINEARS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _random(key: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")
    return torch.Generator().manual_seed(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("hidden", 2048), ("intermediate", 5632), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--without-tuned", action="store_true", help="what merging needs")
    parser.add_argument("--decaying", action="store_true", help="only a base, of decaying weights")
    given = parser.parse_args()
    shape = Shape(given.hidden, given.intermediate, given.layers, given.vocabulary)
    if given.decaying:
        print(make_decaying(given.folder, shape))
        return
    print(make(given.folder, shape, with_tuned=not given.without_tuned))


if __name__ == "__main__":
    main()
