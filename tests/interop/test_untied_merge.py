"""A head trained apart from the embedding it is tied to: PEFT's forward is the untied merge."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import loratool as lt
from tests.interop.conftest import MODELS, logits


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("side", ["head", "embedding"])
@pytest.mark.filterwarnings("ignore")
def test_untied(family: str, side: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = MODELS[family]
    model = make().eval()
    model.save_pretrained(tmp_path / "base")
    target = {"head": ["lm_head"], "embedding": ["wte" if family == "gpt2" else "embed_tokens"]}
    config = LoraConfig(r=3, lora_alpha=24, target_modules=target[side], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)

    def load(path: Path) -> PreTrainedModel:
        return type(make()).from_pretrained(path, dtype=torch.float32).eval()

    base = load(tmp_path / "base")
    under = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "adapter"))
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", ties="apart")
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "both", ties="both")
    expected = logits(under)
    assert torch.allclose(logits(load(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(base), expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(logits(load(tmp_path / "both")), expected, rtol=1e-2, atol=1e-2)
