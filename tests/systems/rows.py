"""The six systems of the LoRA paper as checkpoints with their true names.

Checkpoints and adapters are written with the safetensors library, from shapes that
tests/layouts/test_architectures.py compares with transformers' own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loratool.layouts.architectures import parameters_of
from loratool.layouts.architectures.paper import NAMED
from loratool.layouts.config import ModelConfig
from tests.builders import write_peft
from tests.cli.invoke import invoke

SHARD_BYTES = 2**29
ALPHA = 16
_MOST = 2**33
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class System:
    """A row of the paper. modules: which its adapter changes in every layer."""

    name: str
    rank: int
    modules: tuple[str, ...]
    thin: dict[str, int]

    def config(self, full_size: bool) -> dict[str, Any]:
        """The paper's; or with the widths in ``thin``, of very deep models fewer layers."""
        return {**NAMED[self.name], **({} if full_size else self.thin)}


_THIN_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}
_THIN_DEBERTA = _THIN_BERT | {"position_buckets": 8}
_THIN_GPT2 = {"n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 40}
_ROBERTA = ("attention.self.query", "attention.self.value")
_DEBERTA = ("attention.self.query_proj", "attention.self.value_proj")
_GPT2 = ("attn.c_attn",)

SYSTEMS = {
    system.name: system
    for system in (
        System("roberta-base", 8, _ROBERTA, _THIN_BERT),
        System("roberta-large", 8, _ROBERTA, _THIN_BERT),
        System("deberta-xxl", 16, _DEBERTA, _THIN_DEBERTA | {"num_hidden_layers": 12}),
        System("gpt2-medium", 4, _GPT2, _THIN_GPT2),
        System("gpt2-large", 4, _GPT2, _THIN_GPT2),
        System("gpt3-175b", 4, _GPT2, _THIN_GPT2 | {"n_layer": 12}),
    )
}


class Row:
    """One system's files under ``folder``, each made when it is first asked for."""

    def __init__(self, system: System, folder: Path, *, full_size: bool = False):
        self.system = system
        self.folder = folder
        self.config = system.config(full_size)
        self.shapes = parameters_of(ModelConfig(self.config))
        self.dtype = torch.float16 if full_size else torch.float32

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """Adapted weight → (out, in)."""
        found = {}
        for name, shape in self.shapes.items():
            if name.endswith(tuple(f"{module}.weight" for module in self.system.modules)):
                found[name] = shape[::-1] if self.conv1d else shape
        return found

    @property
    def matrices(self) -> int:
        """How many weights the adapter changes."""
        layers = self.config.get("n_layer") or self.config["num_hidden_layers"]
        return int(layers) * len(self.system.modules)

    @property
    def conv1d(self) -> bool:
        """Whether weights are stored (in, out)."""
        return self.config["model_type"] == "gpt2"

    @cached_property
    def base(self) -> Path:
        """A checkpoint of random weights, in shards as transformers would name them."""
        return write_random(self.folder / "base", self.shapes, self.config, self.dtype)

    @cached_property
    def factors(self) -> Factors:
        """Those of ``adapter``."""
        return self.random_factors(self.system.rank, seed=1)

    def random_factors(self, rank: int, seed: int) -> Factors:
        """Adapted weight → B (out, r), A (r, in)."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (
                torch.randn(out, rank, generator=generator) / out**0.5,
                torch.randn(rank, into, generator=generator) / into**0.5,
            )
            for name, (out, into) in self.adapted.items()
        }

    @cached_property
    def adapter(self) -> Path:
        """A PEFT adapter as if trained."""
        return self.write_adapter("adapter", self.factors)

    def write_adapter(self, folder: str, factors: Factors) -> Path:
        """In PEFT's layout."""
        tensors = {}
        for name, (b, a) in factors.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return write_peft(
            self.folder / folder,
            tensors,
            lora_alpha=ALPHA,
            target_modules=[module.rpartition(".")[2] for module in self.system.modules],
            fan_in_fan_out=self.conv1d,
        )

    @cached_property
    def merged(self) -> Path:
        """By ``loratool merge``, with a receipt."""
        self.loratool("merge", self.base, self.adapter, "-o", self.folder / "merged", "--receipt")
        return self.folder / "merged"

    @contextmanager
    def output(self, name: str) -> Iterator[Path]:
        """Where a command writes; gone afterwards, for the disk is small."""
        yield self.folder / name
        shutil.rmtree(self.folder / name)

    def delta(self, name: str) -> Tensor:
        """s·B·A as the weight is stored, float64."""
        b, a = self.factors[name]
        delta = ALPHA / self.system.rank * (b.double() @ a.double())
        return delta.T if self.conv1d else delta

    def loratool(self, *arguments: object) -> Any:
        """A command that must succeed; what it says in JSON."""
        ended = invoke(*arguments, "--json", most=_MOST)
        assert ended.code == 0, ended.out + ended.err
        return json.loads(ended.out)


def write_random(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], dtype: torch.dtype
) -> Path:
    """Normal values of deviation 0.02, norms around 1; no more than a shard in memory."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Tensor]] = [{}]
    size, weight_map, files = 0, {}, 0
    names = list(shapes)
    for name in names:
        value = torch.empty(shapes[name], dtype=dtype).normal_(0, 0.02, generator=generator)
        if "ln_" in name or "LayerNorm" in name:
            value += 1.0 if name.endswith(".weight") else 0.0
        if size and size + value.nbytes > SHARD_BYTES:
            files += 1
            _write_shard(folder, files, shards.pop(), weight_map)
            shards.append({})
            size = 0
        shards[0][name] = value
        size += value.nbytes
    _write_shard(folder, files + 1, shards.pop(), weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_shard(
    folder: Path, number: int, tensors: dict[str, Tensor], weight_map: dict[str, str]
) -> None:
    file = f"model-{number:05d}.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, file)


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder, one in memory at a time, by the safetensors library."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("loratool"):
            continue
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                yield name, file.get_tensor(name)
