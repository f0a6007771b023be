"""Tiny models of many families, each with inputs that reach all of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_ENCODER: dict[str, Any] = {"max_position_embeddings": 40, "pad_token_id": 0}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
_VISION: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_channels": 3}
_NO_MLP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture, small, with what to feed it and which output to compare.

    raw: globs of parameters that belong to no module that PEFT could adapt or save.
    """

    make: Callable[[], PreTrainedModel]
    inputs: Callable[[], Inputs]
    output: str = "logits"
    raw: tuple[str, ...] = ()


def _tokens() -> Inputs:
    return {"input_ids": torch.arange(2, 26).reshape(2, 12)}


def _sequences() -> Inputs:
    return _tokens() | {"decoder_input_ids": torch.arange(30, 46).reshape(2, 8)}


def _pixels(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _sound() -> Inputs:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": torch.arange(2, 18).reshape(2, 8)}


def _model(name: str, config: str, **values: Any) -> Callable[[], PreTrainedModel]:
    settings = getattr(tf, config)

    def make() -> PreTrainedModel:
        return getattr(tf, name)(settings(**values))

    return make


def _t5_with_own_head() -> PreTrainedModel:
    """Both stored with other values: transformers unties them, whatever the config says."""
    model = tf.T5ForConditionalGeneration(tf.T5Config(**_T5))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def _clip() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4}
    return tf.CLIPModel(
        tf.CLIPConfig(
            text_config=sizes
            | {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0}
            | {"eos_token_id": 25, "pad_token_id": 1},
            vision_config=sizes | _VISION,
            projection_dim=16,
        )
    )


def _causal(
    name: str, config: str | None = None, raw: tuple[str, ...] = (), **values: Any
) -> Family:
    config = config or name.removesuffix("ForCausalLM") + "Config"
    return Family(_model(name, config, **(_SIZES | values)), _tokens, raw=raw)


def _encoder(name: str, config: str, **values: Any) -> Family:
    return Family(_model(name, config, **(_SIZES | _ENCODER | values)), _tokens)


_GPT2: dict[str, Any] = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2}
_GPT2 |= {"n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
_OPT: dict[str, Any] = {"ffn_dim": 48, "max_position_embeddings": 40, "pad_token_id": 1}
_DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
    "position_biased_input": False,
}

_MARIAN: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 40,
}


def _before(decoder: tf.PreTrainedConfig) -> Callable[[], PreTrainedModel]:
    """An image encoder before a language model with a tied head."""
    encoder = tf.ViTConfig(**_SIZES | _VISION)

    def make() -> PreTrainedModel:
        config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        return tf.VisionEncoderDecoderModel(config)

    return make


def _captions() -> Inputs:
    return {"pixel_values": _pixels(), "decoder_input_ids": torch.arange(30, 46).reshape(2, 8)}


FAMILIES: dict[str, Family] = {
    "mamba": _causal("MambaForCausalLM", raw=("*.A_log", "*.D"), state_size=4, time_step_rank=4),
    "llama": _causal("LlamaForCausalLM", **_GROUPED, tie_word_embeddings=False),
    "llama bare": Family(
        _model("LlamaModel", "LlamaConfig", **_SIZES | _GROUPED), _tokens, "last_hidden_state"
    ),
    "llama tied, with biases": _causal(
        "LlamaForCausalLM", **_GROUPED, tie_word_embeddings=True, attention_bias=True
    ),
    "qwen2": _causal("Qwen2ForCausalLM", **_GROUPED, tie_word_embeddings=True),
    "qwen2 untied": _causal("Qwen2ForCausalLM", **_GROUPED, tie_word_embeddings=False),
    "qwen2 answers": Family(
        _model("Qwen2ForQuestionAnswering", "Qwen2Config", **_SIZES | _GROUPED),
        _tokens,
        "start_logits",
    ),
    "gemma": _causal("GemmaForCausalLM", **_GROUPED, head_dim=8),
    "mistral": _causal("MistralForCausalLM", **_GROUPED),
    "phi": _causal("PhiForCausalLM", **_GROUPED),
    "phi3": _causal("Phi3ForCausalLM", **_GROUPED | {"pad_token_id": 0}),
    "gpt2": Family(_model("GPT2LMHeadModel", "GPT2Config", **_GPT2), _tokens),
    "gpt2 classifier": Family(
        _model(
            "GPT2ForSequenceClassification",
            "GPT2Config",
            **_GPT2 | {"num_labels": 3, "pad_token_id": 0},
        ),
        _tokens,
    ),
    "gpt-neox": _causal("GPTNeoXForCausalLM"),
    "gpt-neox tied": _causal("GPTNeoXForCausalLM", tie_word_embeddings=True),
    "falcon": _causal("FalconForCausalLM", new_decoder_architecture=False),
    "falcon grouped": _causal(
        "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "bloom": _causal("BloomForCausalLM", n_layer=2, n_head=4),
    "bloom classifier": Family(
        _model(
            "BloomForSequenceClassification",
            "BloomConfig",
            **_SIZES | {"n_layer": 2, "n_head": 4, "num_labels": 3, "pad_token_id": 0},
        ),
        _tokens,
    ),
    "opt": _causal("OPTForCausalLM", "OPTConfig", **_OPT),
    "opt projected": _causal("OPTForCausalLM", "OPTConfig", **_OPT | {"word_embed_proj_dim": 16}),
    "bert masked": _encoder("BertForMaskedLM", "BertConfig"),
    "bert classifier": _encoder("BertForSequenceClassification", "BertConfig", num_labels=3),
    "bert tagger": _encoder("BertForTokenClassification", "BertConfig", num_labels=5),
    "bert answers": Family(
        _model("BertForQuestionAnswering", "BertConfig", **_SIZES | _ENCODER),
        _tokens,
        "start_logits",
    ),
    "bert bare": Family(
        _model("BertModel", "BertConfig", **_SIZES | _ENCODER), _tokens, "pooler_output"
    ),
    "bert pretraining": Family(
        _model("BertForPreTraining", "BertConfig", **_SIZES | _ENCODER),
        _tokens,
        "prediction_logits",
    ),
    "distilbert classifier": Family(
        _model(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=64,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=40,
        ),
        _tokens,
    ),
    "dinov2 bare": Family(
        _model("Dinov2Model", "Dinov2Config", **_NO_MLP | _VISION),
        lambda: {"pixel_values": _pixels()},
        "pooler_output",
        raw=("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"),
    ),
    "modernbert": _encoder(
        "ModernBertForMaskedLM", "ModernBertConfig", sep_token_id=1, cls_token_id=0
    ),
    "esm": _encoder("EsmForMaskedLM", "EsmConfig", mask_token_id=3),
    "xlnet": Family(
        _model("XLNetLMHeadModel", "XLNetConfig", vocab_size=64, d_model=32, n_layer=2, n_head=4),
        _tokens,
        raw=("transformer.mask_emb",),
    ),
    "marian": Family(
        _model("MarianMTModel", "MarianConfig", **_MARIAN, pad_token_id=1), _sequences
    ),
    "vit and gpt2": Family(_before(tf.GPT2Config(**_GPT2)), _captions),
    "vit and trocr": Family(
        _before(
            tf.TrOCRConfig(
                vocab_size=64,
                d_model=32,
                decoder_layers=1,
                decoder_ffn_dim=48,
                decoder_attention_heads=4,
                max_position_embeddings=40,
            )
        ),
        _captions,
    ),
    "roberta masked": _encoder("RobertaForMaskedLM", "RobertaConfig"),
    "roberta classifier": _encoder("RobertaForSequenceClassification", "RobertaConfig"),
    "deberta-v2 masked": _encoder("DebertaV2ForMaskedLM", "DebertaV2Config", **_DEBERTA),
    "deberta-v2 classifier": _encoder(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA
    ),
    "deberta-v2 convolution": _encoder(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **_DEBERTA | {"conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "t5": Family(_model("T5ForConditionalGeneration", "T5Config", **_T5), _sequences),
    "t5 v1.1": Family(
        _model(
            "T5ForConditionalGeneration",
            "T5Config",
            **_T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        ),
        _sequences,
    ),
    "t5 with a head of its own": Family(_t5_with_own_head, _sequences),
    "t5 encoder": Family(_model("T5EncoderModel", "T5Config", **_T5), _tokens, "last_hidden_state"),
    "bart": Family(
        _model(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=40,
        ),
        _sequences,
    ),
    "vit": Family(
        _model("ViTForImageClassification", "ViTConfig", **_SIZES | _VISION | {"num_labels": 3}),
        lambda: {"pixel_values": _pixels()},
    ),
    "clip": Family(
        _clip,
        lambda: {
            "input_ids": torch.arange(2, 26).reshape(2, 12),
            "pixel_values": _pixels(),
        },
        "logits_per_text",
        raw=("logit_scale",),
    ),
    "whisper classifier": Family(
        _model(
            "WhisperForAudioClassification",
            "WhisperConfig",
            d_model=32,
            encoder_layers=1,
            encoder_ffn_dim=48,
            encoder_attention_heads=4,
            num_mel_bins=8,
            max_source_positions=12,
        ),
        lambda: {"input_features": _sound()["input_features"]},
    ),
    "whisper": Family(
        _model(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=2,
        ),
        _sound,
    ),
}

EXPERT_FAMILIES: dict[str, Family] = {
    "mixtral": _causal("MixtralForCausalLM", **_GROUPED | _EXPERTS),
    "qwen2-moe": _causal("Qwen2MoeForCausalLM", **_GROUPED | _EXPERTS),
    "qwen3-moe": _causal("Qwen3MoeForCausalLM", **_GROUPED | _EXPERTS, mlp_only_layers=[0]),
    "phimoe": _causal("PhimoeForCausalLM", **_GROUPED | _EXPERTS),
    "granite-moe": _causal("GraniteMoeForCausalLM", **_GROUPED | _EXPERTS),
    "deepseek-v3": _causal("DeepseekV3ForCausalLM", **_EXPERTS | _DEEPSEEK),
    "aria": _causal(
        "AriaTextForCausalLM",
        **_GROUPED | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "gpt-oss": _causal("GptOssForCausalLM", raw=("*.sinks",), **_GROUPED | _EXPERTS, head_dim=8),
}
