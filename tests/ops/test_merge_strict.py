"""Inputs that could lead to a wrong result without a word: each is refused, or comes out right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.errors import DisagreementError, NonFiniteValues, UsageError
from tests.builders import random_tensor
from tests.faults.killing import bytes_of
from tests.ops.builders import LLAMA, llama_like, load_folder, save_folder, save_peft

Q = "model.layers.0.self_attn.q_proj"


def replacing(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_fractions_do_not_replace_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    state = llama_like() | {"counts": torch.ones(3).to(dtype)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = replacing(tmp_path / "a", counts=torch.tensor([1.7, 2.2, 3.9]))
    with pytest.raises(DisagreementError, match=r"counts: the base stores .* replaces it by F32"):
        lt.merge(base, adapter, tmp_path / "out")
    same = replacing(tmp_path / "same", counts=torch.zeros(3).to(dtype))
    lt.merge(base, same, tmp_path / "merged")
    assert torch.equal(load_folder(tmp_path / "merged")["counts"], torch.zeros(3).to(dtype))


def test_two_adapters_that_replace_one_parameter(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    values = {"lm_head.weight": random_tensor(50, 24)}
    first, second = (replacing(tmp_path / name, **values) for name in "ab")
    with pytest.raises(DisagreementError, match=r"lm_head.weight: 2 adapters replace") as refused:
        lt.merge(base, [first, second], tmp_path / "out")
    assert refused.value.details == ("adapter 1: replaced", "adapter 2: replaced")


def test_a_replaced_value_that_is_no_number_is_named_once(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    values = {"lm_head.weight": random_tensor(50, 24)}
    values["lm_head.weight"][3, 4] = torch.nan
    with pytest.raises(NonFiniteValues) as refused:
        lt.merge(base, replacing(tmp_path / "a", **values), tmp_path / "out")
    assert refused.value.message.count("lm_head") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_receipt_undoes_overflow(tmp_path: Path, dtype: torch.dtype) -> None:
    """Infinity says nothing of the base's value, which the receipt must then hold."""
    base = save_folder(llama_like(dtype), tmp_path / "base", LLAMA)
    a, b = random_tensor(1, 24), random_tensor(24, 1)
    a[0, 5], b[3, 0] = 100, torch.finfo(dtype).max / 3
    adapter = save_peft(tmp_path / "a", {Q: (a, b)})
    report = lt.merge(base, adapter, tmp_path / "m", receipt=True, allow_overflow=True)
    assert report.total("overflowed") >= 1
    lt.unmerge(tmp_path / "m", adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)


def test_verify_names_the_tensor_that_holds_nan(tmp_path: Path) -> None:
    state = llama_like()
    adapter = save_peft(tmp_path / "a", {Q: (random_tensor(1, 24), random_tensor(24, 1))})
    merged = save_folder(state, tmp_path / "m", LLAMA)
    state[f"{Q}.weight"][2, 3] = torch.nan
    base = save_folder(state, tmp_path / "base", LLAMA)
    with pytest.raises(NonFiniteValues, match=rf"{Q}.weight: NaN or infinity at \[2, 3\]"):
        lt.verify(merged, base, adapter)


def test_a_parameter_that_the_base_stores_under_two_names(tmp_path: Path) -> None:
    norm = "encoder.layer.0.output.LayerNorm"
    state = {f"{norm}.gamma": random_tensor(8), f"{norm}.weight": random_tensor(8, seed=1)}
    base = save_folder(state, tmp_path / "base", {"model_type": "bert"})
    adapter = replacing(tmp_path / "a", **{f"{norm}.weight": random_tensor(8, seed=2)})
    with pytest.raises(DisagreementError, match=r"stores it twice, as .*gamma and as .*weight"):
        lt.merge(base, adapter, tmp_path / "out")


def test_a_square_weight_that_nothing_tells_the_sides_of(tmp_path: Path) -> None:
    name = "h.0.attn.c_proj"
    state = {f"{name}.weight": random_tensor(8, 8)}
    adapter = save_peft(tmp_path / "a", {name: (random_tensor(2, 8), random_tensor(8, 2))})
    base = save_folder(state, tmp_path / "base")
    (note,) = lt.merge(base, adapter, tmp_path / "out").facts["notes"]
    assert (
        note
        == f"{name}.weight is square, and nothing tells how it is stored: it was read as (out, in)"
    )
    for index, more in enumerate(
        ({"h.0.mlp.c_fc.weight": random_tensor(8, 32), "h.0.mlp.c_fc.bias": random_tensor(32)}, {})
    ):
        config = None if more else {"model_type": "gpt2"}
        told = save_folder(state | more, tmp_path / f"told{index}", config)
        assert lt.merge(told, adapter, tmp_path / f"out{index}").facts["notes"] == []
        merged = load_folder(tmp_path / f"out{index}")[f"{name}.weight"]
        plain = load_folder(tmp_path / "out")[f"{name}.weight"]
        turned = (merged - state[f"{name}.weight"]).T
        torch.testing.assert_close(turned, plain - state[f"{name}.weight"], rtol=1e-4, atol=1e-6)


def test_an_adapter_given_twice_is_said(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "a", {Q: (random_tensor(1, 24), random_tensor(24, 1))})
    (tmp_path / "link").symlink_to(adapter)
    report = lt.merge(base, [(adapter, 0.5), (tmp_path / "link", 0.25)], tmp_path / "out")
    assert "a is given 2 times: its update is added as often" in report.facts["notes"]
    assert lt.merge(base, adapter, tmp_path / "once").facts["notes"] == []


def test_an_adapter_that_is_in_already_is_said(tmp_path: Path) -> None:
    """As the receipt of the first merge has it."""
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    first, other = (
        save_peft(tmp_path / name, {Q: (random_tensor(1, 24, seed=i), random_tensor(24, 1))})
        for i, name in enumerate("ab")
    )
    lt.merge(base, [(first, 0.5)], tmp_path / "m", receipt=True)
    (note,) = lt.merge(tmp_path / "m", first, tmp_path / "again").facts["notes"]
    assert note.startswith("a: is merged into this base already, as a, by loratool_receipt")
    with pytest.raises(DisagreementError, match="is not an adapter of this base"):
        lt.merge(tmp_path / "m", first, tmp_path / "x", base_check=True)
    assert lt.merge(tmp_path / "m", other, tmp_path / "both").facts["notes"] == []
    (tmp_path / "m" / "loratool_receipt.safetensors").write_bytes(b"no receipt")
    assert lt.merge(tmp_path / "m", first, tmp_path / "unknown").facts["notes"] == []
    lt.merge(base, first, tmp_path / "m2", receipt=True)
    assert lt.swap(tmp_path / "m2", first, first, tmp_path / "swapped").facts["notes"] == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lists lm_head in modules_to_save"),
        ({"trainable_token_indices": [3]}, "lists tokens in trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "lists tokens in"),
        ({"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}, "lists classifier"),
    ],
)
def test_what_the_config_lists_and_the_file_lacks(
    tmp_path: Path, config: dict[str, object], said: str
) -> None:
    """A note: the merged model is not the one that was trained."""
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    factors = {Q: (random_tensor(2, 24), random_tensor(24, 2))}
    adapter = save_peft(tmp_path / "a", factors, **config)
    notes = lt.merge(base, adapter, tmp_path / "out").facts["notes"]
    assert any(said in note and "file holds nothing" in note for note in notes)


def test_what_the_config_lists_and_the_file_holds(tmp_path: Path) -> None:
    """Of a classifier's two names a model has one."""
    state = llama_like() | {"score.weight": random_tensor(3, 24)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = replacing(tmp_path / "a", **{"score.weight": random_tensor(3, 24)})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert lt.merge(base, adapter, tmp_path / "out").facts["notes"] == []


@pytest.mark.parametrize("weights", [(1e200, 1e200), (1e308, 1.0), (-1e101, 1.0)])
def test_weights_beyond_any_use(tmp_path: Path, weights: tuple[float, float]) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "a", {Q: (random_tensor(2, 24), random_tensor(24, 2))})
    with pytest.raises(UsageError, match=r"adapter 1 has the weight .*, --scale included"):
        lt.merge(base, [(adapter, weights[0])], tmp_path / "out", scale=weights[1])


@pytest.mark.parametrize("side", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_factor_that_is_no_number_is_found(tmp_path: Path, side: str) -> None:
    """By its own name and index."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    factors = {Q: (random_tensor(2, 24), random_tensor(24, 2))}
    dora = side == "lora_magnitude_vector"
    adapter = save_peft(tmp_path / "a", factors, use_dora=dora)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if dora:
        tensors[f"base_model.model.{Q}.{side}"] = random_tensor(24).abs()
    key = next(name for name in tensors if side in name)
    tensors[key].view(-1)[1] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")
    index = "[1]" if dora else "[0, 1]"
    with pytest.raises(NonFiniteValues) as refused:
        lt.merge(base, adapter, tmp_path / "out")
    assert refused.value.message == f"{Q}.weight: {key} holds NaN or infinity at {index}"


def test_a_token_that_is_no_number_is_found(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = random_tensor(2, 24)
    rows[1, 3] = torch.nan
    adapter = replacing(tmp_path / "a", **{name: rows})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"trainable_token_indices": [7, 30]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(NonFiniteValues, match=r"NaN or infinity at \[30, 3\]"):
        lt.merge(base, adapter, tmp_path / "out")
