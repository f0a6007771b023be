"""Names in files against the names that transformers' own models have once loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import loratool as lt
from loratool.layouts.config import ModelConfig
from loratool.layouts.experts import stacks_experts
from loratool.layouts.renames import module_names

_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_DINO = {name: value for name, value in _VISION.items() if name != "intermediate_size"}
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
_QWEN_TEXT = _TEXT | {"rope_parameters": _ROPE}
_EYES = {"depth": 1, "num_heads": 4, "hidden_size": 32, "patch_size": 4}
_EARS = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "num_mel_bins": 8}
_EARS |= {"encoder_ffn_dim": 48, "max_source_positions": 16}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}


def made(name: str, config: str, **values: Any) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(tf, name)(getattr(tf, config)(**values))


def pair(name: str, eyes: Any, text: Any, **values: Any) -> Callable[[], PreTrainedModel]:
    config = getattr(tf, f"{name}Config")
    head = getattr(tf, f"{name}ForConditionalGeneration")
    return lambda: head(config(vision_config=eyes, text_config=text, **values))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "ast": made(
        "ASTForAudioClassification",
        "ASTConfig",
        **{k: v for k, v in _VISION.items() if k != "image_size"},
        max_length=32,
        num_mel_bins=16,
    ),
    "vit_mae": made(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        **_VISION,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=48,
    ),
    "ijepa": made("IJepaForImageClassification", "IJepaConfig", **_VISION),
    "deit": made("DeiTForImageClassification", "DeiTConfig", **_VISION),
    "vit_msn": made("ViTMSNForImageClassification", "ViTMSNConfig", **_VISION),
    "vit_msn bare": made("ViTMSNModel", "ViTMSNConfig", **_VISION),
    "beit": made("BeitForImageClassification", "BeitConfig", **_VISION),
    "dinov2": made("Dinov2ForImageClassification", "Dinov2Config", **_DINO),
    "dinov2 with registers": made(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **_DINO
    ),
    "videomae": made(
        "VideoMAEForVideoClassification", "VideoMAEConfig", **_VISION, num_frames=4, tubelet_size=2
    ),
    "swin": made(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "segformer": made(
        "SegformerForImageClassification",
        "SegformerConfig",
        **_SEGFORMER,
    ),
    "llava": pair("Llava", tf.CLIPVisionConfig(**_VISION), tf.LlamaConfig(**_TEXT)),
    "paligemma": pair(
        "PaliGemma",
        tf.SiglipVisionConfig(**_VISION),
        tf.GemmaConfig(**_TEXT, head_dim=8),
        projection_dim=32,
    ),
    "gemma3": pair(
        "Gemma3",
        tf.SiglipVisionConfig(**_VISION),
        tf.Gemma3TextConfig(**_TEXT, head_dim=8),
        mm_tokens_per_image=4,
    ),
    "mistral3": pair(
        "Mistral3", tf.PixtralVisionConfig(**_VISION, head_dim=8), tf.MistralConfig(**_TEXT)
    ),
    "llava bare": lambda: tf.LlavaModel(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**_VISION), text_config=tf.LlamaConfig(**_TEXT)
        )
    ),
    "dinov3_vit": made("DINOv3ViTModel", "DINOv3ViTConfig", **_VISION),
    "segformer semantic": made(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        **_SEGFORMER,
    ),
    "qwen2_audio": lambda: tf.Qwen2AudioForConditionalGeneration(
        tf.Qwen2AudioConfig(audio_config=_EARS, text_config=tf.Qwen2Config(**_TEXT))
    ),
    "voxtral": lambda: tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(
            audio_config=_TEXT | {"intermediate_size": 128, "num_mel_bins": 8},
            text_config=tf.LlamaConfig(**_TEXT),
        )
    ),
    "mllama": lambda: tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(
            vision_config=_VISION
            | {"num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0]}
            | {"vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]]},
            text_config=_TEXT | {"cross_attention_layers": [1]},
        )
    ),
    "qwen2_vl": pair("Qwen2VL", _EYES | {"embed_dim": 32, "mlp_ratio": 2}, _QWEN_TEXT),
    "qwen2_5_vl": pair(
        "Qwen2_5_VL", _EYES | {"out_hidden_size": 32, "intermediate_size": 48}, _QWEN_TEXT
    ),
    "exaone_moe": made(
        "ExaoneMoeForCausalLM", "ExaoneMoeConfig", **_TEXT | _MOE, moe_intermediate_size=24
    ),
    "minimax_m2": made("MiniMaxM2ForCausalLM", "MiniMaxM2Config", **_TEXT | _MOE, head_dim=8),
    "phimoe": made("PhimoeForCausalLM", "PhimoeConfig", **_TEXT | _MOE),
    "granitemoe": made("GraniteMoeForCausalLM", "GraniteMoeConfig", **_TEXT | _MOE),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_in_files_become_the_models_own(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = list(file.keys())
    own = set(model.state_dict())
    assert set(saved) != own
    config = ModelConfig(model.config.to_dict())
    renamed = [new for new in module_names(saved, config).values() if new in own]
    separate = [old for old in saved if ".experts." in old]
    assert len(renamed) == len(saved) - len(separate)
    assert module_names(own, config) == {key: key for key in own}, "a new name stays"


def test_architectures_whose_experts_are_stacked_on_loading() -> None:
    """transformers' own table says so of each model_type that a config may have."""
    for kind in sorted(tf.CONFIG_MAPPING.keys()):
        table = get_checkpoint_conversion_mapping(kind) or []
        merges = any(
            type(operation).__name__ == "MergeModulelist"
            for conversion in table
            for operation in getattr(conversion, "operations", None) or []
        )
        if kind not in ("dots3_note_vision_encoder", "UnlimitedOcrTextModel"):
            assert stacks_experts(ModelConfig({"model_type": kind})) is merges, kind


def test_names_that_are_not_known_are_said(tmp_path: Path) -> None:
    values = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
    values["pad_token_id"] = 0
    model = made("NomicBertModel", "NomicBertConfig", **values)()
    for side, step in (("base", 0.0), ("tuned", 0.05)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += step * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / side)
    report = lt.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    assert any("names for modules of nomic_bert" in note for note in report.notes)
