"""Every way a command can be told no: what to build, what to run, what must come back."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.builders import (
    GPT2_CONFIG,
    entry,
    gpt2_weights,
    lora_factors,
    write_checkpoint,
    write_peft,
    write_raw_safetensors,
    write_sharded,
)

C_ATTN = "transformer.h.0.attn.c_attn"
Build = Callable[[Path], list[object]]


@dataclass(frozen=True)
class Failure:
    """A command line that must fail. message: what stderr's first line must say."""

    code: int
    message: str
    build: Build
    kind: str


FAILURES: dict[str, Failure] = {}


def failure(name: str, code: int, kind: str, message: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        FAILURES[name] = Failure(code, message, build, kind)
        return build

    return register


def base(folder: Path, **changes: torch.Tensor) -> Path:
    weights = gpt2_weights() | {key.replace("__", "."): value for key, value in changes.items()}
    return write_checkpoint(folder / "base", weights, GPT2_CONFIG)


def tuned(folder: Path, name: str = f"{C_ATTN}.weight") -> Path:
    weights = gpt2_weights()
    weights[name] = weights[name] + torch.randn(weights[name].shape)
    return write_checkpoint(folder / "tuned", weights, GPT2_CONFIG)


def adapter(folder: Path, module: str = C_ATTN, out: int = 24, into: int = 8) -> Path:
    factors = lora_factors(module, out, into, 2)
    return write_peft(folder / "adapter", factors, fan_in_fan_out=True)


def merge(folder: Path, *more: object) -> list[object]:
    return ["merge", folder / "base", folder / "adapter", "-o", folder / "out", *more]


def extract(folder: Path, *more: object) -> list[object]:
    return ["extract", folder / "base", folder / "tuned", "-o", folder / "out", *more]


def merge_setup(folder: Path, *more: object) -> list[object]:
    base(folder)
    adapter(folder)
    return merge(folder, *more)


def extract_setup(folder: Path, *more: object) -> list[object]:
    base(folder)
    tuned(folder)
    return extract(folder, *more)


# Inputs ---------------------------------------------------------------------------------------


@failure("a base that is not there", 3, "InputMissing", "base: no such file or folder")
def _(folder: Path) -> list[object]:
    adapter(folder)
    return merge(folder)


@failure("an adapter that is not there", 3, "InputMissing", "adapter: no such file or folder")
def _(folder: Path) -> list[object]:
    base(folder)
    return merge(folder)


@failure("a folder without weights", 3, "InputMissing", "base: holds no weights")
def _(folder: Path) -> list[object]:
    (folder / "base").mkdir()
    adapter(folder)
    return merge(folder)


@failure("a checkpoint for an adapter", 3, "InputMissing", "base: holds no adapter")
def _(folder: Path) -> list[object]:
    path = base(folder)
    return ["merge", path, path, "-o", folder / "out"]


@failure("a checkpoint's file for an adapter", 3, "UnsupportedInput", "no known adapter format")
def _(folder: Path) -> list[object]:
    path = base(folder)
    return ["merge", path, path / "model.safetensors", "-o", folder / "out"]


@failure("an adapter for a checkpoint", 3, "UnsupportedInput", "adapter: is an adapter")
def _(folder: Path) -> list[object]:
    path = adapter(folder)
    return ["merge", path, path, "-o", folder / "out"]


@failure("an adapter's file for a checkpoint", 3, "UnsupportedInput", "is an adapter")
def _(folder: Path) -> list[object]:
    path = adapter(folder)
    weights = path / "adapter_model.safetensors"
    return ["merge", weights, path, "-o", folder / "out"]


@failure("a text file", 3, "UnsupportedInput", "notes.txt: not a weight file")
def _(folder: Path) -> list[object]:
    (folder / "notes.txt").write_text("hello")
    return ["inspect", folder / "notes.txt"]


@failure("a GGUF file", 3, "UnsupportedInput", "model.gguf: not a weight file")
def _(folder: Path) -> list[object]:
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    return ["inspect", folder / "model.gguf"]


@failure("text called safetensors", 3, "MalformedFile", "model.safetensors: claims a header of")
def _(folder: Path) -> list[object]:
    adapter(folder)
    (folder / "base").mkdir()
    (folder / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec")
    return merge(folder)


@failure("a truncated checkpoint", 3, "TruncatedFile", "model.safetensors: is truncated")
def _(folder: Path) -> list[object]:
    arguments = merge_setup(folder)
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return arguments


@failure("a truncated adapter", 3, "TruncatedFile", "adapter_model.safetensors: is truncated")
def _(folder: Path) -> list[object]:
    arguments = merge_setup(folder)
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return arguments


@failure("a lying header", 3, "MalformedFile", "tensor 'w' claims 4 bytes; F32 of shape [2, 2]")
def _(folder: Path) -> list[object]:
    adapter(folder)
    header = {"w": entry("F32", [2, 2], 0, 4)}
    write_raw_safetensors(folder / "base" / "model.safetensors", header, b"abcd")
    return merge(folder)


@failure("a header of a terabyte", 3, "MalformedFile", "the format allows 100,000,000")
def _(folder: Path) -> list[object]:
    adapter(folder)
    (folder / "base").mkdir()
    content = struct.pack("<Q", 2**40) + b"{}"
    (folder / "base" / "model.safetensors").write_bytes(content)
    return merge(folder)


@failure("a shard missing", 3, "InputMissing", "the shard two.safetensors is missing")
def _(folder: Path) -> list[object]:
    adapter(folder)
    shards = {"one.safetensors": {"a.weight": torch.ones(2)}}
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    write_sharded(folder / "base", shards, index=index)
    return merge(folder)


@failure("an index that climbs", 3, "MalformedFile", "'../../etc/x.safetensors', outside its own")
def _(folder: Path) -> list[object]:
    adapter(folder)
    index = {"weight_map": {"a.weight": "../../etc/x.safetensors"}}
    write_sharded(folder / "base", {}, index=index)
    return merge(folder)


@failure("a config that is no JSON", 3, "MalformedFile", "config.json: is not valid JSON")
def _(folder: Path) -> list[object]:
    arguments = merge_setup(folder)
    (folder / "base" / "config.json").write_text("{")
    return arguments


@failure("an adapter without config", 3, "UnsupportedInput", "adapter_config.json is missing")
def _(folder: Path) -> list[object]:
    arguments = merge_setup(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    return arguments


@failure("a DoRA without magnitudes", 3, "MalformedFile", "has no lora_magnitude_vector")
def _(folder: Path) -> list[object]:
    base(folder)
    write_peft(folder / "adapter", lora_factors(C_ATTN, 24, 8, 2), use_dora=True)
    return merge(folder)


@failure("an alpha that is needed", 2, "UsageError", "does not store alpha")
def _(folder: Path) -> list[object]:
    base(folder)
    factors = {f"{C_ATTN}.lora_A": torch.ones(2, 8), f"{C_ATTN}.lora_B": torch.ones(24, 2)}
    save_file(factors, folder / "adapter.safetensors")
    return ["merge", folder / "base", folder / "adapter.safetensors", "-o", folder / "out"]


@failure("a pickle that calls", 3, "UnsupportedInput", "its pickle asks for")
def _(folder: Path) -> list[object]:
    adapter(folder)
    torch.save({"w": torch.nn.Linear(2, 2)}, folder / "base.bin")
    return ["merge", folder / "base.bin", folder / "adapter", "-o", folder / "out"]


@failure("NaN in the base, merging", 3, "NonFiniteValues", f"{C_ATTN}.weight: ")
def _(folder: Path) -> list[object]:
    weight = torch.randn(8, 24)
    weight[3, 5] = float("nan")
    base(folder, **{f"{C_ATTN}.weight": weight})
    adapter(folder)
    return merge(folder)


@failure("NaN in the adapter", 3, "NonFiniteValues", f"{C_ATTN}.weight: ")
def _(folder: Path) -> list[object]:
    base(folder)
    factors = lora_factors(C_ATTN, 24, 8, 2)
    next(iter(factors.values()))[0, 0] = float("inf")
    write_peft(folder / "adapter", factors, fan_in_fan_out=True)
    return merge(folder)


@failure("NaN in the base, extracting", 3, "NonFiniteValues", f"{C_ATTN}.weight: NaN or infinity")
def _(folder: Path) -> list[object]:
    weight = torch.randn(8, 24)
    weight[3, 5] = float("nan")
    base(folder, **{f"{C_ATTN}.weight": weight})
    tuned(folder)
    return extract(folder, "--rank", "2")


# Inputs that disagree -------------------------------------------------------------------------


@failure("shapes that disagree, merging", 4, "ShapeMismatch", f"{C_ATTN}.weight: the update has")
def _(folder: Path) -> list[object]:
    base(folder)
    adapter(folder, out=30, into=10)
    return merge(folder)


@failure("parts of fused layers for PEFT", 2, "UsageError", "PEFT loads none of them")
def _(folder: Path) -> list[object]:
    base(folder)
    write_checkpoint(folder / "tuned", gpt2_weights(), GPT2_CONFIG)
    return extract(folder, "--split-fused")


@failure("shapes that disagree, extracting", 4, "ShapeMismatch", "1 tensor differs in shape")
def _(folder: Path) -> list[object]:
    base(folder)
    write_checkpoint(folder / "tuned", gpt2_weights(vocabulary=10), GPT2_CONFIG)
    return extract(folder)


@failure("an adapter that matches nothing", 4, "NothingMatches", "1 of the adapter's 1 update")
def _(folder: Path) -> list[object]:
    base(folder)
    adapter(folder, module="encoder.block.7.query")
    return merge(folder)


@failure("another model", 4, "NothingMatches", "tensors are in one checkpoint only")
def _(folder: Path) -> list[object]:
    base(folder)
    write_checkpoint(folder / "tuned", gpt2_weights(layers=2), GPT2_CONFIG)
    return extract(folder)


@failure("nothing changed", 4, "NothingMatches", "there is nothing to extract")
def _(folder: Path) -> list[object]:
    shutil.copytree(base(folder), folder / "tuned")
    return extract(folder, "--rank", "2")


@failure(
    "ranks that disagree", 4, "DisagreementError", "the config says rank 3, the tensors have 2"
)
def _(folder: Path) -> list[object]:
    base(folder)
    write_peft(folder / "adapter", lora_factors(C_ATTN, 24, 8, 2), r=3)
    return merge(folder)


@failure("half of a tied pair", 4, "DisagreementError", "changes transformer.wte.weight alone")
def _(folder: Path) -> list[object]:
    base(folder)
    tensors = {"base_model.model.transformer.wte.weight": torch.ones(16, 8)}
    write_peft(folder / "adapter", tensors)
    return merge(folder)


@failure("a pattern that matches nothing", 4, "NothingMatches", "pattern 'c_atn' matches nothing")
def _(folder: Path) -> list[object]:
    return merge_setup(folder, "--include", "c_atn")


@failure("an exclusion that matches nothing", 4, "NothingMatches", "pattern 'mlp.q' matches")
def _(folder: Path) -> list[object]:
    return extract_setup(folder, "--exclude", "mlp.q")


@failure("everything excluded", 4, "NothingMatches", "the adapter holds no update")
def _(folder: Path) -> list[object]:
    return merge_setup(folder, "--exclude", "c_attn")


@failure("no matrix left", 4, "NothingMatches", "no matrix is left to factorise")
def _(folder: Path) -> list[object]:
    return extract_setup(folder, "--include", "*.bias")


@failure("a result beyond float16", 4, "RangeOverflow", f"{C_ATTN}.weight: ")
def _(folder: Path) -> list[object]:
    write_checkpoint(folder / "base", gpt2_weights(dtype=torch.float16), GPT2_CONFIG)
    adapter(folder)
    return merge(folder, "--scale", "1e6")


# Requests -------------------------------------------------------------------------------------

for _rank, _message in {
    "0": "rank '0': fixed needs a whole number",
    "-4": "rank '-4': fixed needs a whole number",
    "2.5": "rank '2.5': fixed needs a whole number",
    "nan": "'nan'",
    "inf": "'inf'",
    "many": "unknown rank rule 'many'",
    "budget": "a budget is budget:SIZE",
    "energy": "rank 'energy': energy needs a share",
    "energy:1.5": "rank 'energy:1.5': energy needs a share",
    "energy:nan": "rank 'energy:nan': energy needs a share",
    "full:3": "rank rule 'full' takes no number",
    "9": "rank 9 is above the smaller side of every matrix (at most 8)",
    "1000000000": "rank 1000000000 is above the smaller side of every matrix",
}.items():
    failure(f"--rank {_rank}", 2, "UsageError", _message)(
        lambda folder, rank=_rank: extract_setup(folder, "--rank", rank)  # type: ignore[misc]
    )


@failure("an unknown dtype", 2, "UsageError", "unknown dtype 'float12'")
def _(folder: Path) -> list[object]:
    return extract_setup(folder, "--dtype", "float12")


@failure("an unknown device", 2, "UsageError", "unknown device 'tpu'")
def _(folder: Path) -> list[object]:
    return merge_setup(folder, "--device", "tpu")


@failure("a device number that is none", 2, "UsageError", "unknown device 'cuda:x'")
def _(folder: Path) -> list[object]:
    return extract_setup(folder, "--device", "cuda:x")


if not torch.cuda.is_available():

    @failure("a GPU that is not there", 2, "UsageError", "no CUDA device is available")
    def _(folder: Path) -> list[object]:
        return merge_setup(folder, "--device", "cuda")


@failure("a base model that is a path", 2, "UsageError", "--base-model '/home/me/gpt2' is not of")
def _(folder: Path) -> list[object]:
    return extract_setup(folder, "--base-model", "/home/me/gpt2")


@failure("a scale for replaced parameters", 2, "UsageError", "--scale 2 does not apply")
def _(folder: Path) -> list[object]:
    base(folder)
    tensors = {"base_model.model.transformer.ln_f.bias": torch.ones(8)}
    write_peft(folder / "adapter", tensors)
    return merge(folder, "--scale", "2")


@failure("an alpha that is not asked for", 2, "UsageError", "stores its own alpha")
def _(folder: Path) -> list[object]:
    return merge_setup(folder, "--alpha", "8")


# Estimating and starting ----------------------------------------------------------------------


def config_only(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 12}
    path.write_text(json.dumps(GPT2_CONFIG | sizes | changes))
    return path


@failure("a config without a size, estimating", 3, "UnsupportedInput", "lacks n_embd")
def _(folder: Path) -> list[object]:
    return ["estimate", config_only(folder, n_embd=None)]


@failure("a config of a size that is none", 3, "MalformedFile", "n_layer is -2")
def _(folder: Path) -> list[object]:
    return ["estimate", config_only(folder, n_layer=-2)]


@failure("a config of an unknown type", 3, "UnsupportedInput", "model type 'bear'")
def _(folder: Path) -> list[object]:
    return ["estimate", config_only(folder, model_type="bear")]


@failure("a model of no known name", 3, "InputMissing", "gpt5: no such file")
def _(folder: Path) -> list[object]:
    return ["estimate", "gpt5"]


@failure("targets that match nothing, estimating", 4, "NothingMatches", "'c_atn' matches nothing")
def _(folder: Path) -> list[object]:
    return ["estimate", base(folder), "--targets", "c_atn"]


@failure("rank 0, estimating", 2, "UsageError", "rank 0 is not positive")
def _(folder: Path) -> list[object]:
    return ["estimate", base(folder), "--rank", "0"]


@failure("a rank above the smaller side, estimating", 2, "UsageError", "above the smaller side")
def _(folder: Path) -> list[object]:
    return ["estimate", base(folder), "--rank", "9", "--targets", "c_attn"]


def init(folder: Path, *more: object) -> list[object]:
    base(folder)
    return ["init", folder / "base", "-o", folder / "out", *more]


@failure("targets that match nothing, starting", 4, "NothingMatches", "'c_atn' matches nothing")
def _(folder: Path) -> list[object]:
    return init(folder, "--targets", "c_atn")


@failure("rank 0, starting", 2, "UsageError", "rank 0 is not positive")
def _(folder: Path) -> list[object]:
    return init(folder, "--rank", "0")


@failure("a rank above the smaller side, starting", 2, "UsageError", "above the smaller side")
def _(folder: Path) -> list[object]:
    return init(folder, "--rank", "9")


@failure("parts of a fused matrix for PEFT", 2, "UsageError", "c_attn holds q, k and v in one")
def _(folder: Path) -> list[object]:
    write_checkpoint(folder / "base", gpt2_weights(), GPT2_CONFIG | {"n_head": 2})
    return ["init", folder / "base", "-o", folder / "out", "--targets", "query,value"]


@failure("an alpha of zero, converting", 2, "UsageError", "alpha 0 is not positive")
def _(folder: Path) -> list[object]:
    factors = {"h.0.q.lora_A": torch.ones(2, 8), "h.0.q.lora_B": torch.ones(8, 2)}
    save_file(factors, folder / "lora.safetensors")
    return ["convert", folder / "lora.safetensors", "-o", folder / "out", "--alpha", "0"]


@failure("an adapter as the base to start on", 3, "UnsupportedInput", "is an adapter")
def _(folder: Path) -> list[object]:
    return ["init", adapter(folder), "-o", folder / "out"]


@failure("a start in the base's own place", 5, "OutputError", "base: is one of the inputs")
def _(folder: Path) -> list[object]:
    base(folder)
    return ["init", folder / "base", "-o", folder / "base", "--overwrite"]


# Outputs --------------------------------------------------------------------------------------


@failure("an output that exists", 5, "OutputExists", "out: exists already")
def _(folder: Path) -> list[object]:
    (folder / "out").mkdir()
    return merge_setup(folder)


@failure("an output file that exists", 5, "OutputExists", "out: exists already")
def _(folder: Path) -> list[object]:
    (folder / "out").write_text("mine")
    return extract_setup(folder)


@failure("a folder of other things", 5, "OutputError", "will not be replaced")
def _(folder: Path) -> list[object]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("years of work")
    return merge_setup(folder, "--overwrite")


@failure("a file of another kind", 5, "OutputError", "will not be replaced")
def _(folder: Path) -> list[object]:
    (folder / "out").write_text("mine")
    return merge_setup(folder, "--overwrite")


@failure("an output that is the input", 5, "OutputError", "base: is one of the inputs")
def _(folder: Path) -> list[object]:
    merge_setup(folder)
    return ["merge", folder / "base", folder / "adapter", "-o", folder / "base", "--overwrite"]


@failure("an output inside an input", 5, "OutputError", "lies inside the input")
def _(folder: Path) -> list[object]:
    extract_setup(folder)
    return ["extract", folder / "base", folder / "tuned", "-o", folder / "tuned" / "adapter"]


@failure("an output that holds an input", 5, "OutputError", "holds the input")
def _(folder: Path) -> list[object]:
    merge_setup(folder)
    return ["merge", folder / "base", folder / "adapter", "-o", folder, "--overwrite"]


@failure("an output below a file", 5, "OutputError", "file is no folder")
def _(folder: Path) -> list[object]:
    merge_setup(folder)
    (folder / "file").write_text("x")
    return ["merge", folder / "base", folder / "adapter", "-o", folder / "file" / "out"]


def more_than_fits(folder: Path) -> int:
    """Bytes that the disk will not have free, even if others clean up meanwhile."""
    return shutil.disk_usage(folder).free + 2**36


@failure("too little room for a merge", 5, "NoSpace", "out: needs ")
def _(folder: Path) -> list[object]:
    """A base larger than the disk: its data is a hole in a sparse file."""
    adapter(folder)
    sparse_checkpoint(folder / "base", more_than_fits(folder))
    return merge(folder)


@failure("too little room for an adapter", 5, "NoSpace", "out: needs ")
def _(folder: Path) -> list[object]:
    size = more_than_fits(folder)
    for side in ("base", "tuned"):
        sparse_checkpoint(folder / side, size)
    return extract(folder, "--rank", "full")


def sparse_checkpoint(folder: Path, more_than: int) -> None:
    rows = more_than // (4 * 4096) + 1
    data = rows * 4 * 4096
    header = {
        f"{C_ATTN}.weight": entry("F32", [8, 24], 0, 768),
        "transformer.wide.weight": entry("F32", [rows, 4096], 768, 768 + data),
    }
    path = write_raw_safetensors(folder / "model.safetensors", header)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 768 + data)
    (folder / "config.json").write_text(json.dumps(GPT2_CONFIG))
