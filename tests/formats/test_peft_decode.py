"""What PEFT saves, loratool reads as PEFT means it."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from loratool.adapter import Adapter, Replacement
from loratool.errors import (
    DisagreementError,
    LoratoolError,
    MalformedFile,
    Unplaced,
    UnsupportedInput,
    UsageError,
)
from loratool.ops.sources import open_adapter
from tests.builders import lora_factors, write_peft
from tests.formats.conftest import MODELS, adapted, saved

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "all-linear": ("llama", {"r": 2, "target_modules": "all-linear"}),
    "regex": ("gpt2", {"r": 2, "target_modules": r".*h\.1\.(attn|mlp)\.c_proj"}),
    "rslora": (
        "llama",
        {"r": 8, "lora_alpha": 5, "use_rslora": True, "target_modules": ["o_proj"]},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.0\.self_attn\.(q|v)_proj": 3, "q_proj": 5},
            "alpha_pattern": {r"model.layers.1.self_attn.q_proj": 11, "^model.*v_proj": 1.5},
        },
    ),
    "patterns with rslora": (
        "llama",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 9},
            "alpha_pattern": {"up_proj": 2},
        },
    ),
    "modules to save": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "every bias": ("gpt2", {"r": 2, "target_modules": ["c_attn"], "bias": "all"}),
    "biases of adapted modules": (
        "gpt2",
        {"r": 2, "target_modules": ["c_attn"], "bias": "lora_only"},
    ),
    "biases and saved modules": (
        "gpt2",
        {
            "r": 2,
            "target_modules": ["c_fc"],
            "bias": "all",
            "modules_to_save": ["ln_f", "wpe"],
        },
    ),
    "embedding": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("gpt2", {"r": 3, "lora_alpha": 5, "target_modules": ["wte", "c_attn"]}),
    "head": ("llama", {"r": 3, "target_modules": ["lm_head"]}),
}


def check_updates(adapter: Adapter, model: PeftModel, name: str = "default") -> None:
    """Every LoRA layer is an update, with PEFT's scaling and PEFT's own ΔW; nothing else is."""
    layers = {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert layers, "nothing was adapted"
    assert {f"{path}.weight" for path in layers} == set(adapter.low_rank)
    for path, layer in layers.items():
        update = adapter.low_rank[f"{path}.weight"]
        assert update.scale == layer.scaling[name]
        assert update.alpha == layer.lora_alpha[name]
        assert update.rank == layer.r[name]
        theirs = layer.get_delta_weight(name).detach()
        ours = update.load().dense()
        if getattr(layer, "fan_in_fan_out", False) and not update.is_embedding:
            ours = ours.T
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)


def check_replacements(adapter: Adapter, model: PeftModel) -> None:
    """With the adapter merged by PEFT, what it replaced has the values that loratool reads."""
    before = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    changed_low_rank = set(adapter.low_rank) | {"lm_head.weight"}
    for name, replacement in adapter.replacements.items():
        assert torch.equal(replacement.value.read(), merged[name]), name
    trained = {
        name.replace(".modules_to_save.default", "").replace(".base_layer", "")
        for name, parameter in before.items()
        if parameter.requires_grad and ".lora_" not in name
    }
    assert trained <= set(adapter.replacements)
    assert not set(adapter.replacements) & (changed_low_rank - trained)


@pytest.mark.parametrize("case", CONFIGS)
def test_updates_are_pefts(tmp_path: Path, case: str) -> None:
    name, config = CONFIGS[case]
    model = adapted(name, **config)
    folder = saved(model, tmp_path / "adapter")
    adapter = open_adapter(folder)
    assert adapter.format == "PEFT"
    assert adapter.fan_in_fan_out == (name == "gpt2")
    check_updates(adapter, model)
    check_replacements(adapter, model)


def test_the_embedding_that_peft_stores_beside_its_update_is_no_update(tmp_path: Path) -> None:
    model = adapted("llama", r=2, target_modules=["embed_tokens"])
    adapter = open_adapter(saved(model, tmp_path / "adapter"))
    assert set(adapter.updates) == {"model.embed_tokens.weight"}
    copied = adapter.base_copies["model.embed_tokens.weight"].read()
    base = model.base_model.model.model.embed_tokens.base_layer.weight
    assert torch.equal(copied, base)


def test_another_adapter_name(tmp_path: Path) -> None:
    model = adapted("llama", adapter_name="tuned", r=2, target_modules=["q_proj"])
    saved(model, tmp_path / "adapter")
    check_updates(open_adapter(tmp_path / "adapter" / "tuned"), model, "tuned")


def test_the_older_pickle(tmp_path: Path) -> None:
    model = adapted("llama", r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    folder = saved(model, tmp_path / "adapter", safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    adapter = open_adapter(folder)
    check_updates(adapter, model)
    check_replacements(adapter, model)


def test_the_weights_file_itself_can_be_named(tmp_path: Path) -> None:
    model = adapted("llama", r=2, target_modules=["q_proj"])
    folder = saved(model, tmp_path / "adapter")
    check_updates(open_adapter(folder / "adapter_model.safetensors"), model)


# Refused by name ------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "layer replication": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "initialised by pissa"),
    "OLoRA": ({"init_lora_weights": "olora"}, "initialised by olora"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora_that_are_not_read_are_named(tmp_path: Path, kind: str) -> None:
    config, message = KINDS[kind]
    model = adapted("llama", **({"r": 2, "target_modules": ["q_proj"]} | config))
    folder = saved(model, tmp_path / "adapter")
    with pytest.raises(UnsupportedInput, match=message) as caught:
        open_adapter(folder)
    assert caught.value.message.startswith(str(folder))


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("use_dora", True, DisagreementError),
        ("lora_bias", True, DisagreementError),
        ("trainable_token_indices", [1, 2], MalformedFile),
    ],
)
def test_tensors_that_the_config_is_silent_about(
    tmp_path: Path, flag: str, value: object, error: type[Exception]
) -> None:
    """PEFT would leave them out without a word."""
    model = adapted("llama", r=2, target_modules=["q_proj"], **{flag: value})
    folder = saved(model, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    silent = {k: v for k, v in json.loads(path.read_text()).items() if k != flag}
    path.write_text(json.dumps(silent))
    with pytest.raises(error, match=flag):
        open_adapter(folder)


@pytest.mark.parametrize("flag", ["use_dora", "lora_bias"])
def test_a_config_that_promises_what_the_file_lacks(tmp_path: Path, flag: str) -> None:
    folder = write_peft(tmp_path / "a", lora_factors("m.q", 4, 4, 2), **{flag: True})
    with pytest.raises(MalformedFile, match=f"m.q: {flag} is set"):
        open_adapter(folder)


def test_pissa_converted_by_peft_is_plain(tmp_path: Path) -> None:
    """PEFT turns it into a LoRA of twice the rank, on the base as it was before."""
    torch.manual_seed(0)
    base = MODELS["llama"]()
    name = "model.layers.0.self_attn.q_proj"
    before = base.get_submodule(name).weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    saved(model, tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    initial = str(tmp_path / "initial")
    folder = saved(model, tmp_path / "a", path_initial_model_for_weight_conversion=initial)
    update = open_adapter(folder).low_rank[f"{name}.weight"]
    assert update.rank == 4
    after = model.merge_and_unload().get_submodule(name).weight
    torch.testing.assert_close(before + update.load().dense().float(), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peft_type", ["VERA", "OFT", "IA3", "lora", None, 7])
def test_other_peft_types(tmp_path: Path, peft_type: object) -> None:
    folder = write_peft(tmp_path / "a", lora_factors("m.q", 4, 4, 2), peft_type=peft_type)
    with pytest.raises(UnsupportedInput, match=r"of type .*loratool reads LORA"):
        open_adapter(folder)


def test_target_parameters_whose_factors_cannot_be_told_apart(tmp_path: Path) -> None:
    folder = write_peft(
        tmp_path / "a",
        lora_factors("m.experts", 4, 4, 2),
        target_parameters=["experts.down_proj", "experts.gate_up_proj"],
    )
    with pytest.raises(Unplaced, match="experts: has factors for 1 param"):
        open_adapter(folder)


# Broken ---------------------------------------------------------------------------------------

GOOD = lora_factors("m.q", 4, 6, 2)
A, B = GOOD


def test_the_good_one_is_good(tmp_path: Path) -> None:
    assert set(open_adapter(write_peft(tmp_path / "a", GOOD)).updates) == {"m.q.weight"}


BROKEN_TENSORS: dict[str, tuple[dict[str, Any], type[LoratoolError], str]] = {
    "B alone": ({B: GOOD[B]}, MalformedFile, "m.q.lora_B.weight has no lora_A beside it"),
    "A alone": ({A: GOOD[A]}, MalformedFile, "m.q.lora_A.weight has no lora_B beside it"),
    "an unknown key": (
        GOOD | {"base_model.model.m.q.lora_C.weight": torch.ones(2)},
        Unplaced,
        "1 tensor has no known meaning",
    ),
    "a key without the prefix": (GOOD | {"other.weight": torch.ones(2)}, Unplaced, "1 tensor has"),
    "factors that do not chain": (
        GOOD | {B: torch.ones(4, 3)},
        MalformedFile,
        r"m.q: lora_B \(4, 3\) and lora_A \(2, 6\) do not chain",
    ),
    "rank 0": ({A: torch.ones(0, 6), B: torch.ones(4, 0)}, MalformedFile, "m.q: lora_B"),
    "vectors": ({A: torch.ones(2), B: torch.ones(2)}, MalformedFile, r"m.q: factors of shapes"),
    "a kernel and a matrix": (
        {A: torch.ones(2, 6, 3), B: torch.ones(4, 2)},
        MalformedFile,
        "m.q: factors of shapes",
    ),
    "kernels on both sides": (
        {A: torch.ones(2, 6, 3), B: torch.ones(4, 2, 3)},
        MalformedFile,
        "do not chain",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_broken_tensors(tmp_path: Path, case: str) -> None:
    tensors, kind, message = BROKEN_TENSORS[case]
    with pytest.raises(kind, match=message):
        open_adapter(write_peft(tmp_path / "a", tensors, r=2))


def test_unknown_keys_are_listed(tmp_path: Path) -> None:
    tensors = GOOD | {f"strange.{index}": torch.ones(1) for index in range(3)}
    with pytest.raises(Unplaced) as caught:
        open_adapter(write_peft(tmp_path / "a", tensors))
    assert sorted(caught.value.details) == ["strange.0", "strange.1", "strange.2"]


HUGE = 10**400
BROKEN_CONFIGS: dict[str, tuple[dict[str, Any], type[LoratoolError], str]] = {
    "another rank": (
        {"r": 3},
        DisagreementError,
        "m.q: the config says rank 3, the tensors have 2",
    ),
    "a pattern of another rank": (
        {"rank_pattern": {"q": 5}},
        DisagreementError,
        "m.q: the config says rank 5",
    ),
    "no r": ({"r": None}, MalformedFile, "no usable r"),
    "r is zero": ({"r": 0}, MalformedFile, "no usable r"),
    "r is a string": ({"r": "2"}, MalformedFile, "no usable r"),
    "r is true": ({"r": True}, MalformedFile, "no usable r"),
    "r beyond every float": ({"r": HUGE}, LoratoolError, "m.q|r"),
    "no alpha": ({"lora_alpha": None}, MalformedFile, "no usable lora_alpha"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, MalformedFile, "no usable lora_alpha"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, MalformedFile, "no usable lora_alpha"),
    "alpha beyond every float": ({"lora_alpha": HUGE}, MalformedFile, "no usable lora_alpha"),
    "a pattern that is a list": ({"rank_pattern": [1]}, MalformedFile, "unusable rank or alpha"),
    "a pattern of strings": ({"alpha_pattern": {"q": "4"}}, MalformedFile, "unusable"),
    "a pattern beyond every float": ({"alpha_pattern": {"q": HUGE}}, MalformedFile, "unusable"),
    "no regular expression": ({"rank_pattern": {"(q": 2}}, MalformedFile, "not a regular expr"),
    "a repeat beyond counting": (
        {"rank_pattern": {"q{99999999999999}": 2}},
        MalformedFile,
        "pattern 'q{9",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_configs(tmp_path: Path, case: str) -> None:
    config, kind, message = BROKEN_CONFIGS[case]
    with pytest.raises(kind, match=message):
        open_adapter(write_peft(tmp_path / "a", GOOD, **config))


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "LORA"', '{"peft_type"' + "[" * 10**5])
def test_a_config_that_is_no_json(tmp_path: Path, text: str) -> None:
    folder = write_peft(tmp_path / "a", GOOD)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises((MalformedFile, UnsupportedInput)):
        open_adapter(folder)


def test_a_missing_config(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", GOOD)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedInput, match=r"adapter_config.json is missing"):
        open_adapter(folder)


def test_an_alpha_it_did_not_ask_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stores its own alpha"):
        open_adapter(write_peft(tmp_path / "a", GOOD), alpha=8)


LONG_NAME = "a." * 100 + "a"
HOSTILE_PATTERNS = [
    "(a+)+!",
    "(a|aa)*!",
    "(a|a)" * 40 + "!",
    "(?:aa|aa)" * 40 + "!",
    "a?" * 60 + "a" * 60 + "!",
    "[a.]*[a.]*[a.]*[a.]*[a.]*!",
    ".*.*.*!",
    ".{1,99}.{1,99}.{1,99}!",
    "(a*)\\1!",
    "(?=(a+))*!",
    "(((a|b)?|c)?|d)?" * 20 + "!",
    "(" * 5000 + "a" + ")" * 5000,
    "x" * 10**6,
]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS, ids=lambda text: text[:20])
def test_hostile_patterns_return_quickly(tmp_path: Path, pattern: str) -> None:
    """Backtracking for ever on a name of the file's choosing would hang every command."""
    factors: dict[str, Any] = {}
    for name in ("a" * 60, LONG_NAME):
        factors |= lora_factors(name, 4, 4, 2)
    folder = write_peft(tmp_path / "a", factors, rank_pattern={pattern: 2})
    start = time.monotonic()
    try:
        open_adapter(folder)
    except LoratoolError as error:
        assert len(error.message) < 1000  # noqa: PT017
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "q",
        "m.q",
        r"m\.q",
        "^m.q",
        ".*q",
        r"m\.(q|k|v|o)",
        r"(.*\.)?q",
        "[a-z]+.q",
        "(?:m|n).q",
        r"m\.(" + "|".join(map(str, range(80))) + r"|q)",
    ],
)
def test_ordinary_patterns_are_matched(tmp_path: Path, pattern: str) -> None:
    folder = write_peft(tmp_path / "a", GOOD, rank_pattern={pattern: 2}, r=3)
    assert open_adapter(folder).low_rank["m.q.weight"].rank == 2


def test_both_of_a_saved_modules_copies_and_its_bias(tmp_path: Path) -> None:
    """The trained copy wins over the plain key, in whichever order they come."""
    for first, second in (("bias", "modules_to_save.bias"), ("modules_to_save.bias", "bias")):
        values = {"modules_to_save.bias": torch.ones(2), "bias": torch.zeros(2)}
        tensors = GOOD | {f"base_model.model.norm.{part}": values[part] for part in (first, second)}
        tensors["base_model.model.norm.original_module.bias"] = torch.full((2,), 5.0)
        adapter = open_adapter(write_peft(tmp_path / f"a-{first}", tensors))
        update = adapter.updates["norm.bias"]
        assert isinstance(update, Replacement)
        assert torch.equal(update.value.read(), torch.ones(2))
