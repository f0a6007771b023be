"""DoRA and lora_bias through loratool and back into PEFT."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from loratool.adapter import Adapter, DenseUpdate, DoraUpdate, LowRankUpdate
from loratool.errors import Unplaced
from loratool.formats import peft
from loratool.ops.sources import open_adapter
from loratool.storage.tensors import MemoryTensor
from tests.builders import random_tensor
from tests.formats.conftest import MODELS, adapted, saved
from tests.formats.test_peft_encode import load_strictly, update

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"r": 3, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora conv1d": ("gpt2", {"r": 3, "use_dora": True, "target_modules": ["c_attn", "c_fc"]}),
    "dora embedding": ("llama", {"r": 2, "use_dora": True, "target_modules": ["embed_tokens"]}),
    "lora_bias": ("gpt2", {"r": 3, "lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
    "lora_bias, rslora": (
        "gpt2",
        {"r": 3, "lora_bias": True, "use_rslora": True, "target_modules": ["c_proj"]},
    ),
}


def written(adapter: Adapter, base: nn.Module, folder: Path) -> Path:
    modules = {path for path, module in base.named_modules() if hasattr(module, "weight")}
    tensors, side_files = peft.encode(adapter, modules)
    folder.mkdir()
    save_file({key: tensor.read() for key, tensor in tensors.items()}, folder / peft.WEIGHTS_FILE)
    for file, content in side_files.items():
        (folder / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_peft_merges_what_was_encoded_as_the_original(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    first = adapted(name, **config)
    adapter = open_adapter(saved(first, tmp_path / "first"))
    torch.manual_seed(0)
    base = MODELS[name]()
    second = load_strictly(base, written(adapter, base, tmp_path / "second"))
    merged, expected = second.merge_and_unload().state_dict(), first.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(merged), dict(expected), rtol=1e-5, atol=1e-6)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Conv2d(3, 6, 3)
        self.line = nn.Conv1d(3, 5, 2)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_convolutions(setting: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = Convolutions()
    config = LoraConfig(r=2, target_modules=["plane", "line"], init_lora_weights=False)
    setattr(config, setting, True)
    first = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    adapter = open_adapter(saved(first, tmp_path / "first"))
    second = load_strictly(base, written(adapter, base, tmp_path / "second"))
    merged, expected = second.merge_and_unload().state_dict(), first.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(merged), dict(expected), rtol=1e-5, atol=1e-6)


def test_modules_without_a_bias_difference_get_zeros() -> None:
    bias = DenseUpdate(MemoryTensor(random_tensor(3)), 0.5)
    updates = {"a.weight": update(2), "b.weight": update(2), "a.bias": bias}
    tensors, _ = peft.encode(Adapter(updates, "PEFT"), None)
    known = tensors["base_model.model.a.lora_B.bias"].read()
    assert torch.equal(known, random_tensor(3))
    assert not tensors["base_model.model.b.lora_B.bias"].read().any()


def dora(rank: int = 2) -> DoraUpdate:
    return DoraUpdate(update(rank), MemoryTensor(random_tensor(3)))


def embedding() -> LowRankUpdate:
    return replace(update(2), is_embedding=True)


BIAS = DenseUpdate(MemoryTensor(random_tensor(3)), 0.5)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a.weight": dora(), "b.weight": update(2)}, "b: has no magnitude"),
        ({"a.weight": update(2), "b.bias": BIAS}, "b.bias: PEFT stores a difference only"),
        ({"a.weight": BIAS}, "a.weight: PEFT stores a difference only"),
        ({"a.weight": update(2), "a.bias": replace(BIAS, scale=2.0)}, "its module 0.5"),
        ({"a.weight": dora(), "a.bias": BIAS}, "is a DoRA, which PEFT's lora_bias"),
        ({"a.weight": update(2), "a.bias": BIAS, "e.weight": embedding()}, "e: is an embedding"),
    ],
)
def test_what_peft_cannot_say_is_refused(updates: dict[str, Any], message: str) -> None:
    with pytest.raises(Unplaced, match=message):
        peft.encode(Adapter(updates, "PEFT"), None)
