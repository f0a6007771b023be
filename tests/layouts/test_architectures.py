"""Parameters listed from a config are those that transformers makes of the same config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from loratool.errors import MalformedFile, UnsupportedInput
from loratool.layouts.architectures import known_model_types, parameters_of
from loratool.layouts.config import ModelConfig

SMALL = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 61}
HEADS = {"num_attention_heads": 4}
GROUPED = {**SMALL, **HEADS, "num_key_value_heads": 2}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt2-inner": ("gpt2", "GPT2Model", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 40}),
    "bert": ("bert", "BertModel", {**SMALL, **HEADS}),
    "bert-mlm": ("bert", "BertForSequenceClassification", {**SMALL, **HEADS}),
    "roberta": ("roberta", "RobertaForSequenceClassification", {**SMALL, **HEADS}),
    "roberta-bare": ("roberta", "RobertaModel", {**SMALL, **HEADS}),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaModel", {**SMALL, **HEADS}),
    "deberta-v2": ("deberta-v2", "DebertaV2ForSequenceClassification", {**SMALL, **HEADS}),
    "deberta-xxl": (
        "deberta-v2",
        "DebertaV2Model",
        {
            **SMALL,
            **HEADS,
            "relative_attention": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
            "max_relative_positions": -1,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
        },
    ),
    "deberta-own-keys": (
        "deberta-v2",
        "DebertaV2Model",
        {**SMALL, **HEADS, "relative_attention": True, "pos_att_type": "p2c|c2p"},
    ),
    "llama": ("llama", "LlamaForCausalLM", GROUPED),
    "llama-tied": ("llama", "LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "llama-biases": (
        "llama",
        "LlamaForCausalLM",
        {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "mistral": ("mistral", "MistralForCausalLM", GROUPED),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma": ("gemma", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi3": ("phi3", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {**SMALL, **HEADS}),
    "opt": (
        "opt",
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 61,
            "word_embed_proj_dim": 16,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str) -> None:
    model_type, class_name, sizes = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    ours = parameters_of(ModelConfig({**config.to_dict(), "architectures": [class_name]}))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    body = {name for name in theirs if not name.startswith(("classifier", "pooler.dense_task"))}
    renamed = {name.replace("embed_out.", "lm_head."): shape for name, shape in ours.items()}
    if class_name == "DebertaV2ForSequenceClassification":
        body = {name for name in body if not name.startswith("pooler.")}
    assert renamed == {name: theirs[name] for name in body}


def test_every_family_is_compared() -> None:
    assert {model_type for model_type, _, _ in CASES.values()} == set(known_model_types())


def test_a_missing_size_is_named() -> None:
    with pytest.raises(UnsupportedInput, match="lacks hidden_size"):
        parameters_of(ModelConfig({"model_type": "llama"}))


@pytest.mark.parametrize("size", [0, -4, 2.5, "32", True, 10**12])
def test_a_size_that_is_none_is_named(size: object) -> None:
    values = {"model_type": "gpt2", "n_embd": size}
    with pytest.raises(MalformedFile, match="n_embd"):
        parameters_of(ModelConfig(values))


def test_layers_without_end_are_refused() -> None:
    values = {"model_type": "gpt2", "n_embd": 8, "vocab_size": 8, "n_positions": 8}
    with pytest.raises(MalformedFile, match="n_layer"):
        parameters_of(ModelConfig({**values, "n_layer": 10**7}))


def test_an_unknown_type_lists_the_known() -> None:
    with pytest.raises(UnsupportedInput, match="bear") as error:
        parameters_of(ModelConfig({"model_type": "bear"}))
    assert "llama" in error.value.details[0]
