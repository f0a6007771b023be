"""The six systems of the LoRA paper as checkpoints with their true names, and what is done to each.

Checkpoints and adapters are written with the safetensors library, from shapes that
tests/layouts/test_architectures.py compares with transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
_BLOCK = 2**22


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
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Adapted weight → B (out, r), A (r, in)."""
        generator = torch.Generator().manual_seed(1)
        rank = self.system.rank
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
        tensors = {}
        for name, (b, a) in self.factors.items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return write_peft(
            self.folder / "adapter",
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


# The commands ---------------------------------------------------------------------------------


def check_estimate(row: Row) -> None:
    """From the config alone as from the headers; parameters by the paper's formula."""
    arguments = ("--rank", row.system.rank, "--targets", ",".join(row.system.modules))
    of_headers = row.loratool("estimate", row.base, *arguments)
    of_config = row.loratool("estimate", row.base / "config.json", *arguments)
    expected = sum(row.system.rank * sum(shape) for shape in row.adapted.values())
    assert of_headers["trained_parameters"] == of_config["trained_parameters"] == expected
    assert of_headers["parameters"] == of_config["parameters"]
    assert sum(module["matrices"] for module in of_headers["modules"]) == row.matrices


def check_init(row: Row) -> None:
    """B is zero, so ΔW is; the report counts what training would change."""
    output = row.folder / "start"
    targets = ",".join(row.system.modules)
    report = row.loratool(
        "init", row.base, "-o", output, "--rank", row.system.rank, "--targets", targets
    )
    expected = sum(row.system.rank * sum(shape) for shape in row.adapted.values())
    assert report["totals"] == {"modules": row.matrices, "parameters": expected}
    factors = dict(stored(output))
    assert len(factors) == 2 * row.matrices
    for name, value in factors.items():
        assert bool(value.any()) == ("lora_A" in name)
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        out, into = row.adapted[f"{module}.weight"]
        rank = row.system.rank
        assert tuple(value.shape) == ((rank, into) if "lora_A" in name else (out, rank))


def check_merge(row: Row) -> None:
    """Every adapted weight is the stored number nearest to W0 + s·B·A; all others stay."""
    merged = dict.fromkeys(row.shapes, False)
    for (name, before), (same, after) in zip(stored(row.base), stored(row.merged), strict=True):
        assert name == same
        merged[name] = True
        if name in row.adapted:
            assert_nearest(after, before, row.delta(name))
        else:
            assert torch.equal(before, after)
    assert all(merged.values())
    assert len(row.adapted) == row.matrices


def check_verify(row: Row) -> None:
    """The merge is found right value by value, and the base is found not to hold the adapter."""
    against = ("--base", row.base, "--adapter", row.adapter)
    report = row.loratool("verify", row.merged, *against, "--exact")
    assert report["verdict"] == "equal"
    assert report["totals"]["equal"] == len(row.shapes)
    assert invoke("verify", row.base, *against).code == 1


def check_unmerge(row: Row) -> None:
    """The base comes back bit for bit."""
    output = row.folder / "unmerged"
    row.loratool("unmerge", row.merged, row.adapter, "-o", output)
    for path in sorted(row.base.glob("*.safetensors")):
        assert same_bytes(path, output / path.name)


def check_extract(row: Row) -> None:
    """What was merged is found again, on just those matrices, up to the weights' rounding."""
    output = row.folder / "extracted"
    row.loratool("extract", row.base, row.merged, "-o", output, "--rank", row.system.rank)
    factors = dict(stored(output))
    config = json.loads((output / "adapter_config.json").read_text())
    assert len(factors) == 2 * row.matrices
    scale = config["lora_alpha"] / config["r"]
    bound = 1e-5 if row.dtype is torch.float32 else 0.02
    for name in row.adapted:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = (factors[f"{module}.lora_{side}.weight"].double() for side in "BA")
        found, expected = scale * (b @ a), row.delta(name)
        expected = expected.T if row.conv1d else expected
        assert float((found - expected).norm() / expected.norm()) < bound


def check_inspect(row: Row) -> None:
    """Checkpoint and adapter by their headers and small cores."""
    checkpoint = row.loratool("inspect", row.base)
    assert {tensor["name"]: tuple(tensor["shape"]) for tensor in checkpoint["tensors"]} == (
        row.shapes
    )
    adapter = row.loratool("inspect", row.adapter)
    assert {update["name"] for update in adapter["updates"]} == set(row.adapted)
    for update in adapter["updates"]:
        exact = float(row.delta(update["name"]).norm())
        assert abs(update["norm"] - exact) < 1e-9 * exact
        assert update["rank"] == row.system.rank
    check_amplification(row)


def check_amplification(row: Row) -> None:
    """Every update is laid over its weight; the first is measured again by a dense SVD."""
    report = row.loratool("inspect", row.adapter, "--base", row.base)
    found = {update["name"]: update["inside"] for update in report["updates"]}
    assert set(found) == set(row.adapted)
    name, weight = next((n, value) for n, value in stored(row.base) if n in row.adapted)
    rank = row.system.rank
    u, _, vh = torch.linalg.svd(row.delta(name), full_matrices=False)
    exact = float((u[:, :rank].T @ weight.double() @ vh[:rank].T).norm())
    assert abs(found[name] - exact) < 1e-5 * exact


CHECKS: dict[str, Callable[[Row], None]] = {
    "estimate": check_estimate,
    "init": check_init,
    "extract": check_extract,
    "merge": check_merge,
    "unmerge": check_unmerge,
    "verify": check_verify,
    "inspect": check_inspect,
}


def assert_nearest(after: Tensor, before: Tensor, delta: Tensor) -> None:
    """No other number of its dtype is nearer to before + delta than after is."""
    exact = (before.double() + delta).numpy()
    values = after.numpy()
    error = np.abs(values.astype(np.float64) - exact)
    for direction in (-np.inf, np.inf):
        other = np.nextafter(values, values.dtype.type(direction)).astype(np.float64)
        assert bool((error <= np.abs(other - exact) + 1e-15).all())
    assert not torch.equal(after, before)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are the same, without reading them whole."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while block := left.read(_BLOCK):
            if block != right.read(_BLOCK):
                return False
    return True
