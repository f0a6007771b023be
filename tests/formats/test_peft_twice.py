"""Adapters that say one thing twice: which of them is meant cannot be told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from loratool.errors import MalformedFile
from loratool.ops.sources import open_adapter
from tests.builders import random_tensor

MODULE = "model.layers.0.self_attn.q_proj"
FULL = f"base_model.model.{MODULE}"
A, B = random_tensor(2, 8), random_tensor(8, 2, seed=1)
GOOD = {f"{FULL}.lora_A.weight": A, f"{FULL}.lora_B.weight": B}
TABLE = "base_model.model.model.embed_tokens"

TWICE: dict[str, dict[str, Tensor]] = {
    "a factor without the prefix": {f"{MODULE}.lora_A.weight": A + 1},
    "a factor of a named adapter": {f"{FULL}.lora_A.default.weight": A + 1},
    "both factors without the prefix": {
        f"{MODULE}.lora_A.weight": A + 1,
        f"{MODULE}.lora_B.weight": B + 1,
    },
    "a bias": {f"{FULL}.lora_B.bias": B[:, 0], f"{FULL}.lora_B.default.bias": B[:, 1]},
    "a magnitude": {
        f"{FULL}.lora_magnitude_vector": B[:, 0],
        f"{FULL}.lora_magnitude_vector.weight": B[:, 1],
    },
    "a saved module and its weight": {
        "base_model.model.lm_head.modules_to_save.weight": A,
        "base_model.model.lm_head.weight": A + 1,
    },
    "a factor and a replaced weight": {f"{FULL}.weight": B @ A},
    "tokens and the whole table": {
        f"{TABLE}.token_adapter.trainable_tokens_delta": A[:1],
        f"{TABLE}.weight": A,
    },
    "the base's own weight": {
        f"{TABLE}.base_layer.weight": A,
        "model.embed_tokens.base_layer.weight": A + 1,
    },
    "a hadamard factor": {
        "base_model.model.x.hada_w1_a": B,
        "x.hada_w1_a": B + 1,
    },
}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config["trainable_token_indices"] = {"embed_tokens": [3]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", TWICE)
def test_refused_naming_both_keys(tmp_path: Path, case: str) -> None:
    open_adapter(write(tmp_path / "good", GOOD))
    with pytest.raises(MalformedFile, match="both are") as refused:
        open_adapter(write(tmp_path / "twice", GOOD | TWICE[case]))
    named = [key for key in GOOD | TWICE[case] if f"{key} " in f"{refused.value.message} "]
    assert len(named) == 2
