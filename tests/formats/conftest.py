"""Tiny models under real PEFT adapters with random weights, saved by PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> nn.Module:
    """Conv1D everywhere, a tied head."""
    return GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=16, n_layer=2, n_head=2, **SIZES))


def llama() -> nn.Module:
    """Linear everywhere, a head of its own."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            **SIZES,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama}


WARNINGS_OF_LIBRARIES = (
    "Setting `save_embedding_layers`",
    "`is_gradient_checkpointing` is deprecated",
    "`lora_bias=True` was passed",
    ".* LoRA tensor.* have invalid shape. .*lora_B.bias",
    "PiSSA changes the base weights",
    ".*tie_word_embeddings",
)
"""What PEFT and transformers say while tests build and save models. All others are errors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for text in WARNINGS_OF_LIBRARIES:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{text}"))


def adapted(model: str, seed: int = 0, adapter_name: str = "default", **config: Any) -> PeftModel:
    """A model under a LoRA whose every trained value is random: nothing is zero by chance."""
    torch.manual_seed(seed)
    config = {"fan_in_fan_out": model == "gpt2", "init_lora_weights": False} | config
    peft_model = get_peft_model(MODELS[model](), LoraConfig(**config), adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
            assert "lora_" not in name or parameter.requires_grad
    return peft_model


def saved(peft_model: PeftModel, folder: Path, **options: Any) -> Path:
    peft_model.save_pretrained(folder, **options)
    return folder
