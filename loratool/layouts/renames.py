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
)
_BLOCK_SPARSE: Rules = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE: Rules = (
    (r"(\.block_sparse_moe)\.input_linear\.weight$", r"\1.experts.gate_up_proj"),
    (r"(\.block_sparse_moe)\.output_linear\.weight$", r"\1.experts.down_proj"),
    (r"(\.block_sparse_moe)\.router\.layer\.weight$", r"\1.router.weight"),
)
_RENAMES: dict[str, Rules] = {
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
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "vit_msn": ((r"^\.encoder\.", ".vit.encoder."),),
}
"""The same, of models with a head: those without one have no name for what holds the rest."""


def module_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Each name as transformers 5 names the parameter once it is loaded."""
    if config.parts:
        return _names_by_part(list(names), config)
    kind = config.model_type or ""
    rules = _RENAMES.get(kind, ())
    if not (config.architecture or "Model").endswith("Model"):
        rules = (*_HEAD_RENAMES.get(kind, ()), *rules)
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
