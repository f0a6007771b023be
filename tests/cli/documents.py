"""Real documents of every command, for the schemas: made by the command line on small files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.builders import random_tensor, write_peft
from tests.cli.invoke import invoke
from tests.ops.adapters import adapter
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, moved, save_folder

Document = dict[str, Any]


def documents(folder: Path) -> Iterator[tuple[list[str], Document]]:
    """Command line and document, one after the other; later ones use what earlier ones wrote."""
    for arguments in _commands(folder):
        ended = invoke(*arguments, "--json")
        assert ended.err == "", ended.err
        yield [str(argument) for argument in arguments], json.loads(ended.out)


def _commands(f: Path) -> Iterator[list[object]]:
    f.mkdir()
    state = llama_like(torch.bfloat16)
    tuned = moved(state, size=0.05, rank=2)
    tuned["lm_head.weight"] = state["lm_head.weight"]
    save_folder(state, f / "base", LLAMA)
    save_folder(tuned, f / "tuned", LLAMA, shards=2)
    zeros = {name: value * 0 for name, value in state.items()}
    save_folder(zeros, f / "zeros", LLAMA)
    whole = {n: v.float() for n, v in state.items()}
    wide = dict(whole) | {"model.embed_tokens.weight": torch.zeros(700, 600)}
    wide_tuned = dict(wide) | {"model.embed_tokens.weight": random_tensor(700, 600)}
    save_folder(wide, f / "wide", LLAMA)
    save_folder(wide_tuned, f / "wide-tuned", LLAMA)
    broken = {n: v.clone() for n, v in state.items()} | {"counts": torch.arange(3)}
    broken["model.norm.weight"][0] = float("nan")
    broken["model.layers.0.mlp.up_proj.weight"][:] = 0
    save_folder(broken, f / "broken", LLAMA)
    save_folder(gpt2_like(), f / "gpt2", GPT2)
    shapes = {
        f"model.layers.{layer}.{part}": (rows, 24)
        for layer in range(2)
        for part, rows in (("self_attn.q_proj", 24), ("mlp.up_proj", 40))
    }
    for name, seed in (("a", 0), ("b", 50)):
        adapter(f / name, seed=seed, modules=shapes, base_model_name_or_path="org/base")
    norm = {"base_model.model.model.norm.weight": torch.ones(24)}
    adapter(f / "more", modules=shapes, extra=norm)
    dora = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(24)
    }
    only = {"model.layers.0.self_attn.q_proj": (24, 24)}
    adapter(f / "dora", modules=only, extra=dora, use_dora=True)
    zero = {n: t * 0 for n, t in _factors(only).items()}
    write_peft(f / "zero", zero)
    torch.save({"h.0.lora_A": torch.ones(4, 16), "h.0.lora_B": torch.ones(16, 4)}, f / "x.pt")

    # extract, and what looks at its results
    yield ["extract", f / "base", f / "tuned", "-o", f / "e1", "--rank", "2", "--dry-run"]
    yield ["extract", f / "base", f / "tuned", "-o", f / "e1", "--rank", "4", "--dry-run=ranks"]
    yield ["extract", f / "base", f / "tuned", "-o", f / "e1", "--rank", "2"]
    yield ["extract", f / "zeros", f / "tuned", "-o", f / "e2", "--rank", "energy:0.9"]
    options = ["--rank", "4", "--drop-rest", "--base-model", "org/base"]
    yield ["extract", f / "wide", f / "wide-tuned", "-o", f / "e3", *options]
    yield ["extract", f / "base", f / "tuned", "-o", f / "e4", "--rank", "1", "--into", f / "a"]
    yield ["extract", f / "base", f / "tuned", "-o", f / "e5", "--rank", "1", "--dora"]
    yield ["verify", f / "e1", "--base", f / "base", "--tuned", f / "tuned"]

    # merge and back
    merging = ["merge", f / "base", f / "a"]
    yield [*merging, "-o", f / "m1", "--dry-run"]
    yield [*merging, "-o", f / "m1"]
    yield [*merging, f / "b:0.5", "-o", f / "m2", "--receipt", "--lost"]
    yield ["merge", f / "base", f / "dora", "-o", f / "m3"]
    yield ["verify", f / "m1", "--base", f / "base", "--adapter", f / "a"]
    yield ["verify", f / "m1", "--base", f / "base", "--adapter", f / "b"]
    yield ["verify", f / "m2", "--base", f / "base", "--adapter", f / "a", "--adapter", f / "b:0.5"]
    unmerging = ["unmerge", f / "m2", f / "a", f"{f / 'b'}:0.5"]
    yield [*unmerging, "-o", f / "u1", "--dry-run"]
    yield [*unmerging, "-o", f / "u1"]
    yield ["unmerge", f / "m1", f / "a", "-o", f / "u2", "--dry-run"]
    yield ["unmerge", f / "m1", f / "a", "-o", f / "u2"]
    swapping = ["swap", f / "m2", "--remove", f / "a", "--remove", f"{f / 'b'}:0.5"]
    yield [*swapping, "--add", f / "b", "-o", f / "s", "--dry-run"]
    yield [*swapping, "--add", f / "b", "-o", f / "s"]
    yield ["recover", f / "m1"]
    yield ["merge", f / "u2", f / "a", "--in-place", "--dry-run"]
    yield ["merge", f / "u2", f / "a", "--in-place"]

    # adapters
    combining = ["combine", f / "a", f"{f / 'b'}:0.3"]
    yield [*combining, "-o", f / "c1", "--dry-run"]
    yield [*combining, "-o", f / "c1"]
    yield ["combine", f / "a", f / "more", "-o", f / "c2", "--method", "ties", "--rank", "3"]
    (f / "score.py").write_text("print(1)")
    scoring = f"{sys.executable} {f / 'score.py'}"
    yield [*combining, "-o", f / "c3", "--weights-from", scoring, "--trials", 2]
    yield ["resize", f / "a", "-o", f / "r1", "--rank", "2", "--dry-run"]
    yield ["resize", f / "a", "-o", f / "r1", "--rank", "2"]
    yield ["resize", f / "a", "-o", f / "r2", "--rank", "budget:50%"]
    yield ["convert", f / "x.pt", "--alpha", "4", "-o", f / "v1", "--dry-run"]
    yield ["convert", f / "x.pt", "--alpha", "4", "-o", f / "v1"]
    yield ["compare", f / "a", f / "b"]
    yield ["compare", f / "a", f / "a", f / "more"]
    yield ["compare", f / "a", f / "zero"]
    yield ["init", f / "base", "-o", f / "i1", "--dry-run"]
    yield ["init", f / "base", "-o", f / "i1", "--base-model", "org/base"]
    yield ["init", f / "base", "-o", f / "i2", "--method", "pissa", "--residual", f / "res"]
    yield ["push", f / "e3", "org/adapter", "--base-model", "org/base", "--dry-run"]

    # looking
    yield ["estimate", "gpt3-175b", "--rank", "4"]
    yield ["estimate", f / "base"]
    yield ["inspect", f / "base"]
    yield ["inspect", f / "gpt2", "--cost", "2,8"]
    yield ["inspect", f / "wide", "--level", "spectra"]
    yield ["inspect", f / "broken", "--level", "values"]
    for one in ("a", "more", "dora", "zero"):
        yield ["inspect", f / one]
    yield ["inspect", f / "more", "--level", "values"]
    yield ["inspect", f / "a", "--level", "headers"]
    yield ["inspect", f / "base", f / "tuned"]
    yield ["inspect", f / "zeros", f / "tuned"]
    yield ["inspect", f / "base", f / "base"]
    yield ["inspect", f / "wide", f / "wide-tuned"]
    yield ["inspect", f / "base", f / "tuned", "--level", "values"]
    yield ["inspect", f / "base", f / "tuned", "--level", "headers"]
    yield ["inspect", f / "a", f / "b"]
    yield ["inspect", f / "a", f / "b", "--level", "values"]
    yield ["inspect", f / "a", "--base", f / "base"]
    yield ["inspect", f / "base", f / "tuned", "--amplification"]
    yield ["inspect", f / "zero", "--base", f / "zeros"]
    yield ["inspect", f / "a", "--base", f / "base", "--level", "values"]
    yield ["inspect", f / "zero", "--base", f / "zeros", "--level", "values"]
    yield ["inspect", f / "base", f / "tuned", "--intruders"]
    yield ["inspect", f / "a", "--base", f / "zeros", "--intruders"]
    mitigating = ["inspect", f / "a", "--base", f / "zeros", "--mitigate", "0.5"]
    yield [*mitigating, "-o", f / "milder", "--dry-run"]
    yield [*mitigating, "-o", f / "milder"]
    yield ["list", f]
    yield ["list", f, "--checksum", "--kind", "adapter"]

    # errors
    yield ["inspect", f / "nowhere"]
    yield ["merge", f / "base"]


def _factors(modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{module}.lora_{side}.weight": random_tensor(*shape)
        for module, (rows, columns) in modules.items()
        for side, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
