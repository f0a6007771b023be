"""What each parameter of a checkpoint is, from its name, shape, neighbours and the config."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.adapter import ModuleKind, module_of
from loratool.errors import DisagreementError
from loratool.layouts.config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDINGS = {
    "wte",
    "tokens_embed",
    "embed_tokens",
    "word_embeddings",
    "embed_in",
    "shared",
    "tok_embeddings",
    "token_embedding",
    "token_embd",
    "word_embedding",
    "embeddings",
}
_POSITIONS = {
    "wpe",
    "positions_embed",
    "position_embeddings",
    "embed_positions",
    "position_embedding",
    "token_type_embeddings",
    "relative_attention_bias",
}
_TABLE = re.compile(
    r"embed_(?!out$).+|.*embed(der|dings?)?|(.*_)?(embs?|codebook|tokens?|table)"
    r"|.*(Embedder|embeddings)_\d+|.*_embeds_layers?|query_feat|queries_features"
    r"|pe_k|objective"
)
"""Last names of tables whose use is not known (and of an audio model's loss, which has a weight);
stored whole they are right as any module."""
_EXPERT = re.compile(r"(?:.*\.)?experts\.(?:[^.]+\.)?[^.]+")
"""A parameter of a module of experts, or one matrix of it as layouts.experts names it."""
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


_VOCABULARY_HEADS = {
    "lm_head",
    "predictions",
    "embed_out",
    "proj_out",
    "decoder",
    "vocab_projector",
    "generator_lm_head",
    "lm_loss",
}
"""Last names of output heads over the vocabulary."""


def is_over_vocabulary(name: str, kind: ModuleKind) -> bool:
    """Whether the rows of a parameter are tokens."""
    return kind is ModuleKind.EMBEDDING or _last(name) in _VOCABULARY_HEADS


def classify(
    shapes: Shapes, config: ModelConfig, *, adapter_says_conv1d: bool = False
) -> dict[str, ModuleKind]:
    """The kind of every parameter. Shapes are as stored.

    ``adapter_says_conv1d`` (PEFT's fan_in_fan_out) decides where nothing else testifies.
    """
    conv1d = uses_conv1d(shapes, config) or (adapter_says_conv1d and config.uses_conv1d is None)
    return {
        name: _kind(name, shape, conv1d, f"{module_of(name)}.bias" in shapes)
        for name, shape in shapes.items()
    }


def uses_conv1d(shapes: Shapes, config: ModelConfig) -> bool:
    """Whether c_attn, c_proj and c_fc are transformers' Conv1D, stored (in, out).

    A bias has the length of the output side, so every such weight that is not square testifies;
    the config's model_type must not contradict. Raises DisagreementError when it does, or when
    the weights contradict each other.
    """
    stored_in_out, stored_out_in = [], []
    for name, shape in shapes.items():
        bias = shapes.get(f"{module_of(name)}.bias")
        if _last(name) in _CONV1D_NAMES and name.endswith(".weight") and len(shape) == 2 and bias:
            if shape[1] == bias[0] != shape[0]:
                stored_in_out.append(name)
            elif shape[0] == bias[0] != shape[1]:
                stored_out_in.append(name)
    said = config.uses_conv1d
    if stored_in_out and (stored_out_in or said is False):
        raise DisagreementError(
            f"{stored_in_out[0]} is stored as (in, out)",
            details=[f"{stored_out_in[0]} as (out, in)"]
            if stored_out_in
            else [f"model_type {config.model_type!r} stores (out, in)"],
            hint="config.json and weights seem to belong to different models",
        )
    if stored_out_in and said:
        raise DisagreementError(
            f"{stored_out_in[0]} is stored as (out, in), but model_type {config.model_type!r} "
            "stores (in, out)",
            hint="config.json and weights seem to belong to different models",
        )
    return bool(stored_in_out) or bool(said)


def may_be_conv1d(name: str) -> bool:
    """Whether GPT-2's Conv1D layers have weights of this name."""
    return _last(name) in _CONV1D_NAMES and name.endswith(".weight")


def _last(name: str) -> str:
    return module_of(name).rpartition(".")[2]


def _kind(name: str, shape: tuple[int, ...], conv1d: bool, has_bias: bool) -> ModuleKind:
    part = name.rpartition(".")[2]
    last = _last(name)
    if part == "bias":
        return ModuleKind.BIAS
    if part != "weight" and len(shape) == 2 and _EXPERT.fullmatch(name):
        return ModuleKind.EXPERT
    if part != "weight":
        return ModuleKind.OTHER
    if len(shape) == 1:
        return ModuleKind.NORM
    if last in _POSITIONS:
        return ModuleKind.POSITION
    if len(shape) == 4 and max(shape[:3]) == 1:
        return ModuleKind.NORM  # ConvNeXt V2's, over channels that come last
    if len(shape) in (3, 4, 5):
        return ModuleKind.CONV
    if len(shape) != 2:
        return ModuleKind.OTHER
    if last in _EMBEDDINGS:
        return ModuleKind.EMBEDDING
    if conv1d and last in _CONV1D_NAMES:
        return ModuleKind.CONV1D
    listed = _last(module_of(name)) if last.isdigit() else last
    if _TABLE.fullmatch(listed) and not has_bias:
        return ModuleKind.POSITION
    return ModuleKind.LINEAR
