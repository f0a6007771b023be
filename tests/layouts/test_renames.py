"""Files that keep names which transformers 5 gave up."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.adapter import Adapter, LowRankUpdate
from loratool.layouts.config import ModelConfig
from loratool.layouts.placing import place
from loratool.layouts.renames import module_names
from loratool.storage.dtypes import BY_NAME
from loratool.storage.tensors import MemoryTensor, TensorInfo
from tests.builders import random_tensor


@pytest.mark.parametrize(
    ("model_type", "stored", "module"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.embed_in.weight", "gpt_neox.embed_in.weight"),
        ("gpt_neox", "x.embed_out.weight", "x.embed_out.weight"),
        (
            "vit",
            "vit.encoder.layer.0.attention.attention.query.bias",
            "vit.layers.0.attention.q_proj.bias",
        ),
        (
            "vit",
            "encoder.layer.11.attention.output.dense.weight",
            "layers.11.attention.o_proj.weight",
        ),
        ("vit", "vit.encoder.layer.1.intermediate.dense.weight", "vit.layers.1.mlp.fc1.weight"),
        ("vit", "vit.encoder.layer.1.output.dense.weight", "vit.layers.1.mlp.fc2.weight"),
        (
            "bert",
            "bert.encoder.layer.1.output.dense.weight",
            "bert.encoder.layer.1.output.dense.weight",
        ),
        ("", "embed_out.weight", "embed_out.weight"),
        ("bert", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert", "bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    ],
)
def test_names(model_type: str, stored: str, module: str) -> None:
    config = ModelConfig({"model_type": model_type})
    assert module_names([stored], config) == {stored: module}
    assert module_names([module], config) == {module: module}, "a new name stays"


@pytest.mark.parametrize("name", ["lm_head.weight", "embed_out.weight"])
def test_adapters_of_either_naming_land_on_the_stored_name(name: str) -> None:
    config = ModelConfig({"model_type": "gpt_neox", "tie_word_embeddings": False})
    stored = "embed_out.weight"
    tensors = {stored: TensorInfo(stored, BY_NAME["F32"], (9, 4), Path(), 0, 0)}
    update = LowRankUpdate(
        MemoryTensor(random_tensor(9, 2)), MemoryTensor(random_tensor(2, 4)), 1.0, 2.0
    )
    placed = place([(Adapter({name: update}, "PEFT"), 1.0)], tensors, config)
    assert list(placed.updates) == [stored]
    assert placed.updates[stored][0].source == name
