"""Every kind of PEFT adapter that loratool merges, against PEFT's own merge_and_unload."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    KasaConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import loratool as lt
from loratool.errors import DisagreementError, LoratoolError, UnsupportedInput
from loratool.formats import peft
from tests.interop.conftest import gpt2, llama, qwen2
from tests.ops.builders import load_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:.*is_gradient_checkpointing",
    "ignore:.*tie_word_embeddings",
    "ignore:.*no longer tied",
    "ignore:`lora_bias=True` was passed",
    "ignore:.* LoRA tensor.* have invalid shape",
)

Maker = Callable[[], PreTrainedModel]
LORA = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
MATRICES = r".*(q_proj|k_proj|down_proj)"
KINDS: dict[str, tuple[Maker, PeftConfig]] = {
    "dora": (llama, LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], use_dora=True)),
    "dora rslora": (
        llama,
        LoraConfig(**LORA, target_modules=["v_proj"], use_dora=True, use_rslora=True),
    ),
    "dora conv1d": (
        gpt2,
        LoraConfig(**LORA, target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True),
    ),
    "dora embedding": (llama, LoraConfig(**LORA, target_modules=["embed_tokens"], use_dora=True)),
    "lora_bias": (qwen2, LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "lora_bias conv1d": (
        gpt2,
        LoraConfig(**LORA, target_modules=["c_fc"], lora_bias=True, fan_in_fan_out=True),
    ),
    "tokens": (
        llama,
        LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[7, 2, 95]),
    ),
    "tokens tied": (
        qwen2,
        LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[7, 2]),
    ),
    "tokens of both": (
        llama,
        LoraConfig(
            **LORA,
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]},
        ),
    ),
    "tokens alone": (llama, TrainableTokensConfig(token_indices=[0, 11])),
    "loha": (
        llama,
        LoHaConfig(
            r=3,
            alpha=5,
            target_modules=MATRICES,
            init_weights=False,
            rank_pattern={"k_proj": 2},
            alpha_pattern={"down_proj": 2},
        ),
    ),
    "lokr": (llama, LoKrConfig(r=3, alpha=5, target_modules=MATRICES, init_weights=False)),
    "lokr of two products": (
        llama,
        LoKrConfig(
            r=2,
            alpha=5,
            target_modules=MATRICES,
            init_weights=False,
            decompose_both=True,
            decompose_factor=8,
        ),
    ),
    "kasa": (
        llama,
        LoraConfig(
            **LORA, target_modules=["q_proj", "k_proj", "up_proj"], kasa_config=KasaConfig()
        ),
    ),
    "lokr whole": (llama, LoKrConfig(r=64, alpha=5, target_modules=MATRICES, init_weights=False)),
}


def randomised(model: nn.Module, config: PeftConfig) -> nn.Module:
    """The model under an adapter whose every trained value is random."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "base")
    adapted = randomised(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    report = lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    base, ours = load_folder(tmp_path / "base"), load_folder(tmp_path / "merged")
    theirs = dict(adapted.merge_and_unload().named_parameters())
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert changed == {row.name for row in report.rows} != set()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-5, atol=2e-6)


WRITTEN = ["dora", "dora conv1d", "dora embedding", "lora_bias", "tokens", "tokens of both"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_peft_reads_what_was_written_again(kind: str, tmp_path: Path) -> None:
    """Through loratool and back into PEFT: the same merged model."""
    make, config = KINDS[kind]
    torch.manual_seed(0)
    first = make()
    modules = {path for path, module in first.named_modules() if hasattr(module, "weight")}
    adapted = randomised(first, config)
    adapted.save_pretrained(tmp_path / "first")
    tensors, side_files = peft.encode(lt.open_adapter(tmp_path / "first"), modules)
    second = tmp_path / "second"
    second.mkdir()
    save_file({key: tensor.read() for key, tensor in tensors.items()}, second / peft.WEIGHTS_FILE)
    for file, content in side_files.items():
        (second / file).write_bytes(content)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(make(), str(second))
    assert not [str(w.message) for w in caught if "keys" in str(w.message)]
    expected = dict(adapted.merge_and_unload().named_parameters())
    for name, value in loaded.merge_and_unload().named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


class Convolutions(nn.Module):
    """A kernel that is not square, one of size one, a grouped and a one-dimensional one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 8, (3, 2))
        self.point = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.line = nn.Conv1d(6, 8, 3)
        self.dot = nn.Conv1d(6, 9, 1)


CONVOLUTIONS: dict[str, tuple[list[str], PeftConfig]] = {
    "dora": (["wide", "point", "line"], LoraConfig(**LORA, use_dora=True)),
    "lora_bias": (["wide", "point"], LoraConfig(**LORA, lora_bias=True)),
    "loha": (["wide", "point", "grouped", "line"], LoHaConfig(r=3, alpha=5, init_weights=False)),
    "loha tucker": (
        ["wide", "point", "grouped", "line"],
        LoHaConfig(r=3, alpha=5, init_weights=False, use_effective_conv2d=True),
    ),
    "lokr": (["wide", "point", "grouped", "line"], LoKrConfig(r=1, alpha=5, init_weights=False)),
    "lokr whole": (
        ["wide", "point", "grouped", "line", "dot"],
        LoKrConfig(r=8, alpha=5, init_weights=False, decompose_factor=3),
    ),
    "lokr tucker": (
        ["wide", "grouped"],  # PEFT itself fails on those of one dimension
        LoKrConfig(r=1, alpha=5, init_weights=False, use_effective_conv2d=True),
    ),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_merged_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    names, config = CONVOLUTIONS[kind]
    config.target_modules = set(names)
    torch.manual_seed(0)
    model = Convolutions()
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file(base, tmp_path / "base.safetensors")
    adapted = randomised(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    lt.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged")
    ours = load_folder(tmp_path / "merged")
    theirs = dict(adapted.merge_and_unload().named_parameters())
    for name, value in ours.items():
        module, _, part = name.rpartition(".")
        changes = module in names and (part == "weight" or kind == "lora_bias")
        assert torch.equal(value, base[name]) != changes
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-5, atol=2e-6)


def test_a_trained_bias_without_a_base_bias_is_named(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True)
    randomised(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(DisagreementError, match=r"lora_bias.*q_proj.bias"):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


REFUSED: dict[str, tuple[PeftConfig, type[LoratoolError], str]] = {
    "replicated layers": (
        LoraConfig(**LORA, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
        UnsupportedInput,
        "layer_replication",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, error, message = REFUSED[kind]
    model = llama()
    model.save_pretrained(tmp_path / "base")
    randomised(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(error, match=message):
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_biases_can_be_left_out(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(**LORA, target_modules=["q_proj"], lora_bias=True)
    randomised(model, config).save_pretrained(tmp_path / "adapter")
    report = lt.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", exclude=["*.bias"]
    )
    assert {row.name.rpartition(".")[2] for row in report.rows} == {"weight"}
