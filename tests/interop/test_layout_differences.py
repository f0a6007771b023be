"""Base and tuned that store one model in different layouts, and adapters named apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import Unplaced, UsageError
from tests.interop.families import EXPERT_FAMILIES, FAMILIES
from tests.interop.test_families import load, save_pair

State = dict[str, torch.Tensor]


def weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def with_weights(folder: Path, like: Path, state: State) -> Path:
    """The checkpoint ``like`` with other tensors."""
    folder.mkdir()
    config = json.loads((like / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    return folder


def same_adapters(one: Path, two: Path) -> bool:
    files = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, two)]
    assert set(files[0]) == set(files[1])
    return configs[0] == configs[1] and all(
        torch.equal(value, files[1][name]) for name, value in files[0].items()
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_may_be_stacked_on_either_side(name: str, tmp_path: Path) -> None:
    family = EXPERT_FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    stacked = {
        side.name: with_weights(
            tmp_path / f"stacked-{side.name}", side, load(family, side).state_dict()
        )
        for side in (base, tuned)
    }
    assert any(key.endswith("experts.gate_up_proj") for key in weights(stacked["base"]))
    lt.extract(base, tuned, tmp_path / "separate", rank=2)
    for number, (left, right) in enumerate(
        [(base, stacked["tuned"]), (stacked["base"], tuned), (stacked["base"], stacked["tuned"])]
    ):
        lt.extract(left, right, tmp_path / f"a{number}", rank=2)
        assert same_adapters(tmp_path / "separate", tmp_path / f"a{number}")
    lt.merge(base, tmp_path / "a0", tmp_path / "merged")
    lt.merge(stacked["base"], tmp_path / "a0", tmp_path / "merged-stacked")
    one = load(family, tmp_path / "merged").state_dict()
    two = load(family, tmp_path / "merged-stacked").state_dict()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def split(state: State) -> State:
    """Phi-3's fused layers apart, as copies of it in Llama's layout have them."""
    result = {}
    for name, value in state.items():
        if "qkv_proj" in name:
            sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
            for part, rows in zip(sizes, value.split(list(sizes.values())), strict=True):
                result[name.replace("qkv_proj", part)] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True):
                result[name.replace("gate_up_proj", part)] = rows
        else:
            result[name] = value
    return result


def test_fused_projections_may_be_apart_on_either_side(tmp_path: Path) -> None:
    base, tuned = save_pair(FAMILIES["phi3"], tmp_path)
    apart = {
        side.name: with_weights(tmp_path / f"apart-{side.name}", side, split(weights(side)))
        for side in (base, tuned)
    }
    lt.extract(base, tuned, tmp_path / "fused", rank=2)
    report = lt.extract(base, apart["tuned"], tmp_path / "fused-again", rank=2)
    assert same_adapters(tmp_path / "fused", tmp_path / "fused-again")
    assert any("joined from its parts" in note for note in report.notes)
    lt.extract(apart["base"], apart["tuned"], tmp_path / "split", rank=2)
    report = lt.extract(apart["base"], tuned, tmp_path / "split-again", rank=2)
    assert same_adapters(tmp_path / "split", tmp_path / "split-again")
    assert any("split into its parts" in note for note in report.notes)


FUSED = {
    "gpt2": "attn.c_attn",
    "phi3": "qkv_proj",
    "gpt-neox": "query_key_value",
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "falcon grouped": "query_key_value",
}


@pytest.mark.parametrize("name", FUSED)
def test_split_parts_merge_into_the_fused_layer(name: str, tmp_path: Path) -> None:
    base, tuned = save_pair(FAMILIES[name], tmp_path)
    lt.extract(
        base,
        tuned,
        tmp_path / "adapter",
        rank="full",
        split_fused=True,
        profile="llama.cpp",
        drop_rest=True,
    )
    updates = lt.open_adapter(tmp_path / "adapter").updates
    assert any(".q_proj." in module for module in updates)
    assert not any(FUSED[name] in module for module in updates)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged, wanted = weights(tmp_path / "merged"), weights(tuned)
    fused = [key for key in wanted if f"{FUSED[name]}.weight" in key]
    assert fused
    for key in fused:
        torch.testing.assert_close(merged[key], wanted[key], rtol=1e-6, atol=1e-6)


def test_parts_hold_what_the_models_own_code_calls_q_k_and_v(tmp_path: Path) -> None:
    """With only the query of the first layer changed, only its part has an update."""
    base, tuned = save_pair(FAMILIES["gpt-neox"], tmp_path)
    state = weights(base)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    heads = state[name].view(4, 3, 8, 32)
    heads[:, 0] += weights(tuned)[name].view(4, 3, 8, 32)[:, 0]
    query = with_weights(tmp_path / "query", base, state)
    lt.extract(base, query, tmp_path / "a", rank=2, split_fused=True, profile="llama.cpp")
    (module,) = lt.open_adapter(tmp_path / "a").updates
    assert module == "gpt_neox.layers.0.attention.q_proj.weight"


def test_split_is_not_for_peft_nor_for_an_unknown_arrangement(tmp_path: Path) -> None:
    base, tuned = save_pair(FAMILIES["bloom"], tmp_path)
    with pytest.raises(UsageError, match="PEFT loads none"):
        lt.extract(base, tuned, tmp_path / "a", split_fused=True)
    for side in (base, tuned):
        config = json.loads((side / "config.json").read_text())
        (side / "config.json").write_text(json.dumps(config | {"model_type": "chatglm"}))
    with pytest.raises(Unplaced, match="models of type chatglm have an order of their own"):
        lt.extract(base, tuned, tmp_path / "a", split_fused=True, profile="sglang")
