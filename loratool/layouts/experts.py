"""Mixtures of experts: one matrix per expert, however a checkpoint stores them.

Checkpoints hold an expert's gate, up and down matrices one by one (``experts.3.w1.weight``) or
all experts of a layer stacked in one parameter (``experts.gate_up_proj``). transformers 5 loads
both into stacked parameters, gate above up, for the architectures named here, and PEFT adapts
those. So the matrices are described as they are after loading, one by one, by parameter and
index: ``experts.gate_up_proj.3``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loratool.adapter import module_of
from loratool.errors import DisagreementError
from loratool.layouts.config import ModelConfig
from loratool.storage.views import Joined, Stored, Transposed, member_of

_SEPARATE = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_STACKED = re.compile(r".*\.experts\.[^.]+")
_MATRIX = re.compile(r"((?:.*\.)?experts)\.[^.]+\.\d+")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_RETARGETED = {
    "mixtral": frozenset({"w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate_proj", "up_proj", "down_proj"}),
}
_LIKE_MIXTRAL = frozenset(
    {
        "deepseek_v4",
        "kimi_linear",
        "lfm2_moe",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl",
        "mistral_large4_text",
        "mixtral",
        "phimoe",
    }
)
_LIKE_QWEN2_MOE = frozenset(
    {
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm5_next",
        "glm5_next_text",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "kimi_k25",
        "kolibri1",
        "laguna",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "nemotron_h",
        "olmoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "qwen4_exp_text",
        "sarvam_mla",
        "sarvam_moe",
        "solar_open",
    }
)
"""model_type of architectures that transformers 5.24 loads into stacked parameters, from its table
of conversions: files with w1, w2, w3, and files with gate_proj, up_proj, down_proj."""
_INPUT_FIRST = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Of these, stacked matrices lie as (in, out) where PEFT's factors are of (out, in)."""
_EITHER_WAY = frozenset({"qwen3_vl_moe"})
"""Of these, files have (in, out) from transformers 4 and (out, in) from 5, which loads that."""


@dataclass(frozen=True)
class Experts:
    """Of one model. blocks: the modules that hold experts. parts: names of layers that PEFT takes
    for experts'. input_first: whether their matrices are stored as (in, out)."""

    blocks: frozenset[str]
    parts: frozenset[str]
    input_first: bool = False

    def is_input_first(self, name: str) -> bool:
        """Whether a name is of an expert's matrix that is stored as (in, out)."""
        return self.input_first and _MATRIX.fullmatch(name) is not None

    def is_router(self, name: str) -> bool:
        """Whether a weight is a router's: a module of its own kind, which PEFT saves whole."""
        parent, _, last = module_of(name).rpartition(".")
        return last in ("gate", "router") and parent in self.blocks

    def is_retargeted(self, name: str) -> bool:
        """Whether PEFT takes the name of an ordinary layer for an expert's, so that its weight
        has to be named as a parameter."""
        return name.endswith(".weight") and module_of(name).rpartition(".")[2] in self.parts


def find_experts(names: Iterable[str], config: ModelConfig, *, stacked: bool) -> Experts:
    """The experts among these names of matrices. stacked: whether the base stores them so."""
    blocks = frozenset(module_of(match[1]) for match in map(_MATRIX.fullmatch, names) if match)
    if not blocks:
        return Experts(frozenset(), frozenset())
    kind = config.model_type
    parts: frozenset[str] = frozenset()
    if kind in _LIKE_MIXTRAL:
        parts = _RETARGETED["mixtral"]
    elif kind in _LIKE_QWEN2_MOE:
        parts = _RETARGETED["qwen2_moe"]
    elif kind is None:
        parts = _RETARGETED["mixtral"] | _RETARGETED["qwen2_moe"]
    return Experts(blocks, parts, stacked and kind in _INPUT_FIRST)


def stacks_experts(config: ModelConfig) -> bool:
    """Whether transformers 5 loads separate experts into stacked parameters; without a config,
    yes, as it does for nearly all."""
    return config.model_type is None or config.model_type in _LIKE_MIXTRAL | _LIKE_QWEN2_MOE


def has_stacked(tensors: Mapping[str, Stored]) -> bool:
    """Whether a checkpoint stores stacked experts."""
    return any(_is_stack(name, tensor) for name, tensor in tensors.items())


def by_expert(tensors: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """The tensors, with one matrix per expert in place of stacks and of separate parts.

    Raises DisagreementError where separate experts are not complete.
    """
    separate: dict[str, dict[int, dict[str, Stored]]] = {}
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _SEPARATE.fullmatch(name) if stacks_experts(config) else None
        if match:
            part = _PARTS.get(match[3], match[3])
            separate.setdefault(match[1], {}).setdefault(int(match[2]), {})[part] = tensor
        elif _is_stack(name, tensor):
            for index in range(tensor.shape[0]):
                member = member_of(tensor, index)
                turned = _is_turned(name, member.shape, config)
                result[f"{name}.{index}"] = Transposed(member) if turned else member
        else:
            result[name] = tensor
    for module, experts in separate.items():
        _check_complete(module, experts)
        for index, parts in sorted(experts.items()):
            if {"gate_proj", "up_proj"} <= set(parts):
                fused = Joined((parts.pop("gate_proj"), parts.pop("up_proj")))
                result[f"{module}.gate_up_proj.{index}"] = fused
            for part, tensor in parts.items():
                result[f"{module}.{part}.{index}"] = tensor
    return result


def _is_stack(name: str, tensor: Stored) -> bool:
    return (
        _STACKED.fullmatch(name) is not None
        and len(tensor.shape) == 3
        and min(tensor.shape[1:]) > 1
    )


def _is_turned(name: str, shape: tuple[int, ...], config: ModelConfig) -> bool:
    """Whether a matrix of a stack lies the other way round than it is loaded."""
    text = config.values.get("text_config")
    hidden = text.get("hidden_size") if isinstance(text, dict) else None
    if config.model_type not in _EITHER_WAY or hidden not in shape or shape[0] == shape[1]:
        return False
    return bool(shape[0 if name.endswith("gate_up_proj") else 1] == hidden)


def _check_complete(module: str, experts: Mapping[int, Mapping[str, Stored]]) -> None:
    wanted = {part for parts in experts.values() for part in parts}
    for index in range(max(experts) + 1):
        missing = wanted - set(experts.get(index, {}))
        if missing:
            raise DisagreementError(
                f"{module}: expert {index} has no {', '.join(sorted(missing))}",
                hint="the checkpoint is not complete; fetch it again",
            )
