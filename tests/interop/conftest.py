"""Tiny transformers models, fine-tuned by random steps, as base and tuned checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

Maker = Callable[[], PreTrainedModel]


def gpt2() -> PreTrainedModel:
    """Conv1D, fused c_attn, square c_proj, tied head."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96,
            n_positions=32,
            n_embd=48,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> PreTrainedModel:
    """Linear without bias, untied head, so an embedding of its own."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def qwen2() -> PreTrainedModel:
    """Linear with biases on q, k, v; tied head."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def roberta() -> PreTrainedModel:
    """An encoder with a classification head and three embedding tables."""
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            num_labels=3,
        )
    )


MODELS: dict[str, Maker] = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "roberta": roberta}


def save_pair(
    make: Maker, folder: Path, dtype: torch.dtype, size: float = 0.02
) -> tuple[Path, Path]:
    """A base and a copy in which every parameter moved, in ``dtype``."""
    torch.manual_seed(7)
    model = make().to(dtype)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape) * size
            parameter.copy_((parameter.float() + step).to(dtype))
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's output on fixed tokens, float32."""
    tokens = torch.arange(1, 25).reshape(2, 12)
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


@pytest.fixture(params=sorted(MODELS))
def make(request: pytest.FixtureRequest) -> Maker:
    """Each model in turn."""
    return MODELS[request.param]
