"""A base of torch pickles comes back as safetensors whatever the merge did to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from tests.builders import random_tensor
from tests.ops.builders import LLAMA, State, llama_like, load_folder, save_peft
from tests.ops.test_unmerge import FACTORS, bytes_of

TIED = LLAMA | {"tie_word_embeddings": True, "vocab_size": 50}


def tied_state() -> State:
    state = llama_like(torch.float16)
    del state["lm_head.weight"]
    return state


def save_pickles(state: State, folder: Path, shards: int) -> Path:
    """A checkpoint as transformers used to lay it out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TIED))
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name] for name in list(state)[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def adapter_for(folder: Path, *, biases: bool, tokens: bool) -> Path:
    """Two modules, with biases that the base has not or with a token that it has not."""
    settings: dict[str, object] = {"lora_bias": biases}
    if tokens:
        settings["trainable_token_indices"] = [3, 50]
    path = save_peft(folder, FACTORS, lora_alpha=16, **settings)
    tensors = load_file(path / "adapter_model.safetensors")
    if biases:
        for module in FACTORS:
            tensors[f"base_model.model.{module}.lora_B.bias"] = random_tensor(24)
    if tokens:
        name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        tensors[name] = random_tensor(2, 24)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, ""),
        ({"dtype": "bfloat16"}, ""),
        ({"dtype": "float32", "max_shard_size": "4KB"}, ""),
        ({"max_shard_size": "1GB"}, ""),
        ({"ties": "apart"}, ""),
        ({"add_bias": True}, "biases"),
        ({}, "tokens"),
    ],
    ids=str,
)
def test_it_comes_back(tmp_path: Path, options: dict[str, object], kind: str, shards: int) -> None:
    """Names, dtypes, shapes and shards are the base's, and an index names the shards."""
    state = tied_state()
    base = save_pickles(state, tmp_path / "base", shards)
    adapter = adapter_for(tmp_path / "adapter", biases=kind == "biases", tokens=kind == "tokens")
    lt.merge(base, adapter, tmp_path / "merged", receipt=True, **options)  # type: ignore[arg-type]
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    back = load_folder(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(back[name].dtype == value.dtype for name, value in state.items())
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == TIED
    assert lt.open_checkpoint(tmp_path / "back").keys() == state.keys()
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == shards


def test_swap_of_a_pickled_base(tmp_path: Path) -> None:
    """The same bytes as unmerge and then merge, where the shards are the base's."""
    base = save_pickles(tied_state(), tmp_path / "base", 3)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "merged", receipt=True)
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    lt.swap(tmp_path / "merged", adapter, [(adapter, 0.5)], tmp_path / "swapped")
    lt.merge(tmp_path / "back", [(adapter, 0.5)], tmp_path / "again", receipt=True)
    assert bytes_of(tmp_path / "swapped") == bytes_of(tmp_path / "again")
