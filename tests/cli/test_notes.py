"""What many notes of one kind look like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratool.cli.output import _alike
from tests.builders import random_tensor
from tests.cli.invoke import invoke
from tests.ops.builders import save_folder, save_peft

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 8,
    "head_dim": 4,
}


@pytest.fixture
def fused(tmp_path: Path) -> tuple[Path, Path]:
    """A base with fused projections and an adapter of their five parts."""
    layer = "model.layers.0."
    state = {
        f"{layer}self_attn.qkv_proj.weight": random_tensor(16, 8),
        f"{layer}mlp.gate_up_proj.weight": random_tensor(12, 8, seed=1),
        "model.norm.weight": torch.ones(8),
    }
    rows = {"q": 8, "k": 4, "v": 4}
    parts = {f"{layer}self_attn.{name}_proj": size for name, size in rows.items()}
    parts |= {f"{layer}mlp.{name}_proj": 6 for name in ("gate", "up")}
    factors = {
        name: (random_tensor(2, 8, seed=2), random_tensor(size, 2, seed=3))
        for name, size in parts.items()
    }
    base = save_folder(state, tmp_path / "base", CONFIG)
    return base, save_peft(tmp_path / "adapter", factors)


def test_many_of_a_kind_are_one_line(fused: tuple[Path, Path], tmp_path: Path) -> None:
    short = invoke("merge", *fused, "-o", tmp_path / "a")
    assert short.code == 0
    (line,) = [line for line in short.err.splitlines() if line.startswith("note:")]
    assert line == (
        "note: gate_proj was read as a part of gate_up_proj (4 more like this; -v shows all)"
    )
    full = invoke("merge", *fused, "-o", tmp_path / "b", "-v")
    assert full.err.count("was read as a part of") == 5
    machine = invoke("merge", *fused, "-o", tmp_path / "c", "--json")
    assert len(json.loads(machine.out)["notes"]) == 5


def test_what_is_alike() -> None:
    other = "embed.weight grows from 64 to 71 tokens"
    parts = [f"{name} was read as a part of qkv_proj" for name in ("q", "k", "v")]
    assert _alike([parts[0], other, *parts[1:]]) == [parts, [other]]
    assert _alike(["one", "two"]) == [["one"], ["two"]]
