"""What loratool writes, PEFT loads as loratool means it."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from loratool.adapter import Adapter, LowRankUpdate, Replacement, TokenRows
from loratool.errors import Unplaced
from loratool.formats import peft
from loratool.formats.registry import AdapterFile, decode_adapter
from loratool.ops.sources import open_adapter
from loratool.storage.tensors import MemoryTensor
from tests.builders import random_tensor
from tests.formats.conftest import MODELS, adapted, saved
from tests.formats.test_peft_decode import CONFIGS, check_updates

PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "proj", "q_proj", "a+", "x[0]"])
MODULES = st.sets(st.lists(PARTS, min_size=1, max_size=3).map(".".join), min_size=1, max_size=12)


@st.composite
def choices(draw: st.DrawFn) -> tuple[set[str], set[str]]:
    """All modules of a model, and some of them."""
    modules = draw(MODULES)
    return modules, draw(st.sets(st.sampled_from(sorted(modules)), min_size=1))


def update(rank: int, alpha: float = 1.0) -> LowRankUpdate:
    b, a = MemoryTensor(random_tensor(3, rank)), MemoryTensor(random_tensor(rank, 4, seed=1))
    return LowRankUpdate(b, a, alpha / rank, alpha)


def written_config(adapter: Adapter, modules: set[str]) -> dict[str, Any]:
    _, side_files = peft.encode(adapter, modules)
    config: dict[str, Any] = json.loads(side_files[peft.CONFIG_FILE])
    return config


@settings(max_examples=100, deadline=None)
@given(choices())
def test_target_modules_are_exactly_the_adapted_ones(drawn: tuple[set[str], set[str]]) -> None:
    """By PEFT's own matching: no module too many, none too few."""
    modules, chosen = drawn
    adapter = Adapter({f"{module}.weight": update(1) for module in chosen}, "PEFT")
    config = LoraConfig(target_modules=written_config(adapter, modules)["target_modules"])
    found = {module for module in modules if check_target_module_exists(config, module)}
    assert found == chosen


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(MODULES.map(min), st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1)
)
def test_ranks_and_alphas_are_found_again(modules: dict[str, tuple[int, int]]) -> None:
    """By PEFT's own matching, and by loratool's."""
    updates = {f"{m}.weight": update(rank, alpha * 1.5) for m, (rank, alpha) in modules.items()}
    tensors, side_files = peft.encode(Adapter(updates, "PEFT"), modules)
    config = json.loads(side_files[peft.CONFIG_FILE])
    for module, (rank, alpha) in modules.items():
        ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
        assert ranks.get(get_pattern_key(ranks.keys(), module), config["r"]) == rank
        found = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
        assert found == alpha * 1.5
    decoded = decode_adapter(AdapterFile("written", tensors, side_files)).low_rank
    assert set(decoded) == set(updates)
    for name, expected in updates.items():
        assert decoded[name].rank == expected.rank
        assert decoded[name].scale == expected.scale
        assert decoded[name].alpha == expected.alpha


def test_names_are_short_where_they_can_be() -> None:
    """Readable configs: what servers and people expect to find in target_modules."""
    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    queries = {name for name in layers if "q_proj" in name}
    assert peft.short_names(queries, set(layers)) == ["q_proj"]
    assert peft.short_names(set(layers), set(layers)) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    some = {layers[0], layers[4]}
    assert peft.short_names(some, set(layers)) == sorted(some)
    assert peft.short_names({"a.0"}, {"a.0", "b.1"}) == ["a.0"], "a bare number says nothing"
    assert peft.short_names({"m.proj"}, {"m.proj", "m.q_proj"}) == ["m.proj"], (
        "modules_to_save matches ends of names, not of components"
    )


def test_many_modules_take_no_time() -> None:
    """256 experts of 60 layers: quadratic work would take minutes."""
    modules = {
        f"layers.{i}.experts.{e}.w{k}" for i in range(60) for e in range(256) for k in (1, 2)
    }
    chosen = {name for name in modules if name.endswith("w1")}
    assert peft.short_names(chosen, modules) == ["w1"]


@pytest.mark.parametrize("case", sorted(set(CONFIGS) - {"tied embedding"}))
def test_peft_loads_what_was_decoded_and_encoded_again(tmp_path: Path, case: str) -> None:
    """Through loratool and back into PEFT: the same updates, the same replaced values."""
    name, config = CONFIGS[case]
    first = adapted(name, **config)
    adapter = open_adapter(saved(first, tmp_path / "first"))
    torch.manual_seed(0)
    base = MODELS[name]()
    modules = {path for path, module in base.named_modules() if hasattr(module, "weight")}
    tensors, side_files = peft.encode(adapter, modules)
    second = tmp_path / "second"
    second.mkdir()
    save_file({key: tensor.read() for key, tensor in tensors.items()}, second / peft.WEIGHTS_FILE)
    for file, content in side_files.items():
        (second / file).write_bytes(content)
    loaded = load_strictly(base, second)
    check_updates(adapter, loaded)
    merged, expected = loaded.merge_and_unload().state_dict(), first.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6)


def load_strictly(base: nn.Module, folder: Path) -> PeftModel:
    """PEFT only warns of keys that it misses or does not know."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, str(folder))
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "keys" in text], texts
    return model


@pytest.mark.parametrize("rank", [3, 8])
def test_scales_survive_whatever_alpha_says(rank: int) -> None:
    """Rank-stabilised, plain, and neither: the scale is what counts."""
    factors = update(rank)
    stabilised = replace(factors, alpha=5.0, scale=5 / math.sqrt(rank))
    plain = replace(factors, alpha=5.0, scale=5 / rank)
    neither = replace(factors, alpha=5.0, scale=0.3)
    for chosen in ([stabilised], [plain], [stabilised, plain], [neither, stabilised, plain]):
        updates = {f"m.x{index}.weight": value for index, value in enumerate(chosen)}
        tensors, side_files = peft.encode(Adapter(updates, "PEFT"), {"m.x0", "m.x1", "m.x2"})
        again = decode_adapter(AdapterFile("written", tensors, side_files)).low_rank
        for name, value in updates.items():
            assert math.isclose(again[name].scale, value.scale, rel_tol=1e-15)
        if len(chosen) == 1:
            assert again["m.x0.weight"] == chosen[0]


def test_what_peft_cannot_store_is_named() -> None:
    value = MemoryTensor(torch.ones(2))
    both = {"m.weight": update(1)}
    with pytest.raises(Unplaced, match=r"m\.gate: its module is both updated and replaced"):
        peft.encode(Adapter(both | {"m.gate": Replacement(value)}, "PEFT"), {"m"})
    with pytest.raises(Unplaced, match="weight: PEFT cannot store"):
        peft.encode(Adapter({"weight": Replacement(value)}, "PEFT"), {"m"})


def test_a_bare_parameter_is_saved_with_its_module() -> None:
    """PEFT wraps the outermost module once; modules inside it are not listed again."""
    value = Replacement(MemoryTensor(torch.ones(2)))
    names = ("m.cls_token", "m.patch.weight", "m.patch.bias", "n.bias", "n.p.weight")
    updates = dict.fromkeys(names, value) | {"q.weight": update(1)}
    tensors, side_files = peft.encode(Adapter(updates, "PEFT"), {"m", "m.patch", "n", "n.p", "q"})
    config = json.loads(side_files["adapter_config.json"])
    assert config["modules_to_save"] == ["m", "p"]
    assert config["bias"] == "all"
    assert {f"base_model.model.{name}" for name in names} <= set(tensors)


def test_a_config_is_plain_json_that_older_versions_read() -> None:
    """Unknown keys made older versions fail: only long-known ones are written."""
    config = written_config(Adapter({"m.q.weight": update(2, 3.0)}, "PEFT"), {"m.q"})
    assert config["lora_alpha"] == 3
    assert isinstance(config["lora_alpha"], int)
    assert set(config) <= {
        "peft_type",
        "base_model_name_or_path",
        "task_type",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "fan_in_fan_out",
        "bias",
    }
    assert not [key for key in config if re.search("path", key) and config[key]]


def test_trained_tokens_alone_are_a_type_of_their_own(tmp_path: Path) -> None:
    """PEFT loads no LORA without a target."""
    rows = {
        f"{table}.weight": TokenRows((1, 3), MemoryTensor(random_tensor(2, 16, seed=seed)))
        for seed, table in enumerate(("model.embed_tokens", "lm_head"))
    }
    tensors, side_files = peft.encode(Adapter(rows, "PEFT"), None)
    save_file({k: v.read() for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / peft.CONFIG_FILE).write_bytes(side_files[peft.CONFIG_FILE])
    model = load_strictly(MODELS["llama"](), tmp_path).merge_and_unload()
    for name, update in rows.items():
        assert torch.equal(model.get_parameter(name)[[1, 3]], update.value.read())
    again = open_adapter(tmp_path)
    assert {name: update.indices for name, update in again.updates.items()} == dict.fromkeys(
        rows, (1, 3)
    )
