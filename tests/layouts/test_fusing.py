"""Which outputs of a fused projection are whose, and where nothing decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratool.layouts.config import ModelConfig
from loratool.layouts.fused import split_fused
from loratool.layouts.fusing import Undecided, offered_names
from loratool.storage.tensors import MemoryTensor

HEADS = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 16}
NAME = "model.layers.0.self_attn.qkv_proj.weight"


def split(config: dict[str, Any], rows: int, name: str = NAME) -> dict[str, list[float]] | str:
    """The rows of each part, by its module; or the reason why not."""
    value = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 3)
    found = split_fused(name, MemoryTensor(value), ModelConfig(config))  # type: ignore[arg-type]
    shapes = {name: (rows, 3)}
    offered = offered_names(shapes, ModelConfig(config), conv1d=False)
    if isinstance(found, Undecided):
        assert not offered  # merging would not guess either
        return found.reason
    assert set(found) <= set(offered)
    for part, tensor in found.items():
        (piece,) = offered[part].pieces
        assert piece.places is not None
        taken = [row for row, place in enumerate(piece.places) if place >= 0]
        assert tensor.read()[:, 0].tolist() == taken  # extracting and merging agree
    return {key.split(".")[-2]: part.read()[:, 0].tolist() for key, part in found.items()}


def test_query_heads_and_shared_ones() -> None:
    assert split(HEADS | {"num_key_value_heads": 2}, 32) == {
        "q_proj": list(range(16)),
        "k_proj": list(range(16, 24)),
        "v_proj": list(range(24, 32)),
    }


def test_heads_in_turn() -> None:
    config = {"model_type": "bloom", "n_head": 2}
    found = split(config, 12, "h.0.self_attention.query_key_value.weight")
    assert found == {"q_proj": [0, 1, 6, 7], "k_proj": [2, 3, 8, 9], "v_proj": [4, 5, 10, 11]}


@pytest.mark.parametrize(
    ("config", "rows", "reason"),
    [
        ({"model_type": "llama"}, 48, "none of num_attention_heads"),
        (HEADS | {"n_head": 8}, 48, "num_attention_heads 4 and n_head 8"),
        (
            HEADS | {"num_key_value_heads": 2, "num_kv_heads": 1},
            48,
            "num_key_value_heads 2 and num_kv_heads 1",
        ),
        (
            HEADS | {"text_config": {"num_attention_heads": 2}},
            48,
            "num_attention_heads 4 and text_config.num_attention_heads 2",
        ),
        (HEADS, 24, "do not fit"),  # heads of keys that the config does not tell of
        (HEADS | {"head_dim": 8}, 48, "do not fit"),
        (HEADS | {"model_type": "codegen"}, 48, "order of their own"),
    ],
)
def test_nothing_is_guessed(config: dict[str, Any], rows: int, reason: str) -> None:
    found = split(config, rows)
    assert isinstance(found, str)
    assert reason in found


def test_the_same_number_twice_is_no_contradiction() -> None:
    config = HEADS | {"n_head": 4, "text_config": {"num_attention_heads": 4}}
    assert isinstance(split(config, 48), dict)
