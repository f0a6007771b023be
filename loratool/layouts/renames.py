"""Names in files that differ from the names of the modules they are loaded into.

transformers 5 renamed modules and goes on writing the old names. PEFT adapts modules, so an
adapter uses the new names; older adapters use the old ones. Both are read, the new ones written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.layouts.config import ModelConfig

Rule = tuple[str, str]
Rules = tuple[Rule, ...]

_LEGACY: Rules = (
    (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),
    (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
)
"""Of all models: names from the time of TensorFlow checkpoints."""

_VIT: Rules = (
    (r"encoder\.layer\.", r"layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"(layers\.\d+\.attention\.)query\.", r"\1q_proj."),
    (r"(layers\.\d+\.attention\.)key\.", r"\1k_proj."),
    (r"(layers\.\d+\.attention\.)value\.", r"\1v_proj."),
    (r"(layers\.\d+\.attention\.)output\.dense\.", r"\1o_proj."),
    (r"(layers\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(layers\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
)
_BEIT: Rules = (
    (r"\.encoder\.relative_position_bias\.", r".shared_position_bias."),
    (r"\.attention\.attention\.(relative_position_bias\.)", r".\1"),
    *_VIT,
)
_DINOV2: Rules = (
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
_SWIN: Rules = (
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (
        r"\.attention\.self\.relative_position_bias_table$",
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_SEGFORMER: Rules = (
    (r"\.encoder\.patch_embeddings\.(\d+)\.", r".stages.\1.patch_embeddings."),
    (r"\.encoder\.block\.(\d+)\.", r".stages.\1.blocks."),
    (r"\.encoder\.layer_norm\.(\d+)\.", r".stages.\1.layer_norm."),
    (r"\.attention\.self\.query\.", ".attention.q_proj."),
    (r"\.attention\.self\.key\.", ".attention.k_proj."),
    (r"\.attention\.self\.value\.", ".attention.v_proj."),
    (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
    (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.dense(1|2)\.", r".mlp.fc\1."),
    (r"\.layer_norm_1\.", ".layernorm_before."),
    (r"\.layer_norm_2\.", ".layernorm_after."),
    (r"^\.decode_head\.linear_c\.", ".decode_head.linear_projections."),
)
_BLOCK_SPARSE: Rules = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE: Rules = (
    (r"(\.block_sparse_moe)\.input_linear\.weight$", r"\1.experts.gate_up_proj"),
    (r"(\.block_sparse_moe)\.output_linear\.weight$", r"\1.experts.down_proj"),
    (r"(\.block_sparse_moe)\.router\.layer\.weight$", r"\1.router.weight"),
)
_ARIA: Rules = (
    (r"(\.mlp\.experts)\.fc1\.weight$", r"\1.gate_up_proj"),
    (r"(\.mlp\.experts)\.fc2\.weight$", r"\1.down_proj"),
)
_RENAMES: dict[str, Rules] = {
    "aria": _ARIA,
    "aria_text": _ARIA,
    "gpt_neox": ((r"^\.embed_out\.", ".lm_head."),),
    "vit": _VIT,
    "deit": _VIT,
    "vit_msn": _VIT,
    "vit_mae": _VIT,
    "vivit": _VIT,
    "ijepa": _VIT,
    "audio-spectrogram-transformer": _VIT,
    "beit": _BEIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "swin": _SWIN,
    "segformer": _SEGFORMER,
    "videomae": (
        (r"(\.attention\.attention)\.q_bias$", r"\1.query.bias"),
        (r"(\.attention\.attention)\.v_bias$", r"\1.value.bias"),
    ),
    "yolos": ((r"(\.encoder)(\.mid_position_embeddings)$", r"\1.interpolation\2"),),
    "mixtral": _BLOCK_SPARSE,
    "minimax": _BLOCK_SPARSE,
    "minimax_m2": _BLOCK_SPARSE,
    "phimoe": (*_BLOCK_SPARSE, (r"(\.mlp)\.gate\.weight$", r"\1.router.weight")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "exaone_moe": ((r"(\.mlp)(\.e_score_correction_bias)$", r"\1.gate\2"),),
    "ernie4_5_moe": ((r"(\.mlp)(\.moe_statics\.)", r"\1.gate\2"),),
    "nemotron_h": ((r"^\.backbone\.", ".model."),),
    "hy_v3": (
        (r"\.mlp\.router\.gate\.weight$", ".mlp.gate.weight"),
        (r"\.mlp\.expert_bias$", ".mlp.e_score_correction_bias"),
        (r"\.mlp\.shared_mlp\.", ".mlp.shared_experts."),
    ),
    "dinov3_convnext": ((r"^\.stages\.", ".model.stages."),),
    "dinov3_vit": ((r"(?<!\.model)\.layer\.", ".model.layer."),),
}
"""model_type → (pattern, replacement), applied in turn to the name with a dot before it."""

_LLAVA: Rules = (
    (r"^\.language_model\.lm_head\.", ".lm_head."),
    (r"^\.(language_model|vision_tower|multi_modal_projector|image_newline)(\.|$)", r".model.\1\2"),
    (r"^(\.model\.language_model)\.model\.", r"\1."),
    (r"^(\.model\.vision_tower)\.vision_model\.", r"\1."),
)
_QWEN_VL: Rules = (
    (r"^\.visual\.", ".model.visual."),
    (r"^\.model\.(?!language_model\.|visual\.)", ".model.language_model."),
)
_THINKER: Rules = (
    (r"^\.(audio_tower|visual)\.", r".model.\1."),
    (r"^\.model\.(?!language_model\.|visual\.|audio_tower\.)", ".model.language_model."),
)
_BEHIND_MODEL: Rules = (
    (r"^\.language_model\.lm_head\.", ".lm_head."),
    (r"^\.(?!lm_head\.|model\.)", ".model."),
    (r"^(\.model\.language_model)\.model\.", r"\1."),
    (r"^(\.model\.\w+)\.vision_model\.", r"\1."),
)
_HEAD_RENAMES: dict[str, Rules] = {
    **dict.fromkeys(
        (
            "aya_vision",
            "gemma3",
            "got_ocr2",
            "internvl",
            "llava",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "mistral3",
            "paligemma",
            "vipllava",
        ),
        _LLAVA,
    ),
    **dict.fromkeys(
        (
            "aria",
            "audioflamingo3",
            "fuyu",
            "glmasr",
            "granite_speech",
            "granite_speech_plus",
            "mllama",
            "musicflamingo",
            "qwen2_audio",
            "vibevoice_asr",
            "video_llava",
            "voxtral",
            "voxtral_realtime",
        ),
        _BEHIND_MODEL,
    ),
    "qwen2_5_omni": tuple((old.replace("^", r"(?<=^\.thinker)"), new) for old, new in _THINKER),
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "vit_msn": ((r"^\.encoder\.", ".vit.encoder."),),
}
"""The same, of models with a head: those without one have no name for what holds the rest."""
_BARE: Rules = (
    (r"^(\.language_model)\.model\.", r"\1."),
    (r"^(\.vision_tower)\.vision_model\.", r"\1."),
)
_BARE_RENAMES = {
    kind: _BARE for kind, rules in _HEAD_RENAMES.items() if rules in (_LLAVA, _BEHIND_MODEL)
}
"""The same, of models without a head."""


_PARTLY_KNOWN = frozenset(
    {
        "altclip",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "chmv2",
        "cohere_asr",
        "colpali",
        "conditional_detr",
        "cosmos3_edge",
        "cosmos3_omni",
        "csm",
        "d_fine",
        "dab-detr",
        "deepseek_v4",
        "deformable_detr",
        "depth_anything",
        "depth_pro",
        "detr",
        "dino",
        "dory",
        "dots3_note",
        "ernie4_5_vl_moe",
        "flint",
        "glm5_next",
        "glm5_next_text",
        "gradium_phonon_tts",
        "grounding-",
        "gte",
        "hrm_text",
        "hy_v4",
        "hy_v4_vl",
        "hy_v4_vl_text",
        "hyperclovax_vision_v2",
        "inkling2",
        "inkling2_loop",
        "inkling2_loop_text",
        "inkling2_text",
        "inkling_mm_model",
        "jina_embeddings_v3",
        "kimi_k25",
        "kimi_linear",
        "kolibri1",
        "kyutai_speech_to_text",
        "laguna",
        "lara_mini",
        "lfm3",
        "lfm3_vl",
        "lfm3_vl_vision",
        "lw_detr",
        "mask2former",
        "maskformer",
        "mimi",
        "mimi_decoder",
        "mimi_encoder",
        "mimo_v2_flash",
        "minimax_m3_vl",
        "mistral_large4",
        "mistral_large4_text",
        "mm-grounding-dino",
        "molmo2",
        "molmo2_text",
        "nemo_speechlm",
        "nemotron_h_omni",
        "nomic_bert",
        "olmo_hybrid",
        "oneformer",
        "paddleocr_vl",
        "pi0",
        "pixio",
        "pp_doclayout_v2",
        "pp_doclayout_v3",
        "pp_doclayout_v4",
        "prompt_depth_anything",
        "qianfan_ocr",
        "radio",
        "rf_detr",
        "rt_detr",
        "rt_detr_v2",
        "sam3_tracker",
        "sam3_tracker_video",
        "sam3_video",
        "sapiens2",
        "shieldgemma2",
        "step3p7",
        "t5gemma2",
        "timesfm2_5",
        "tipsv2",
        "tipsv2_dpt",
        "tipsv2_text_model",
        "tipsv2_vision_model",
        "ultrabert",
        "ultravbert",
        "unlimited_ocr",
        "zoedepth",
    }
)
"""model_type of models that transformers 5.24 loads under names of which these rules lack some."""


def has_unknown_names(config: ModelConfig) -> bool:
    """Whether the model has modules under names that ``module_names`` does not give."""
    kinds = [config.model_type, *(part.model_type for part in config.parts.values())]
    return any(kind in _PARTLY_KNOWN for kind in kinds)


def module_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Each name as transformers 5 names the parameter once it is loaded."""
    if config.parts:
        return _names_by_part(list(names), config)
    kind = config.model_type or ""
    rules = _RENAMES.get(kind, ())
    bare = (config.architecture or "Model").endswith("Model")
    rules = (*(_BARE_RENAMES if bare else _HEAD_RENAMES).get(kind, ()), *rules)
    compiled = [(re.compile(old), new) for old, new in (*_LEGACY, *rules)]
    renamed = {}
    for name in names:
        value = f".{name}"
        for old, new in compiled:
            value = old.sub(new, value)
        renamed[name] = value[1:]
    return renamed


def _names_by_part(names: list[str], config: ModelConfig) -> dict[str, str]:
    renamed = {name: name for name in names}
    for part, inner in config.parts.items():
        start = f"{part}."
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        renamed |= {start + old: start + new for old, new in module_names(inside, inner).items()}
    return renamed
