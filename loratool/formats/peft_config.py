"""``adapter_config.json`` as PEFT reads it: kinds of adapters, scaling, patterns.

Checked against PEFT 0.21: the order in which patterns are matched and how a module's scaling
follows from them come from its source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import DisagreementError, MalformedFile, UnsupportedInput

CONFIG_FILE = "adapter_config.json"
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Top-level modules that PEFT saves whole for a task, whatever the config lists."""
READ_TYPES = ("LORA", "LOHA", "LOKR", "TRAINABLE_TOKENS")

_UNSAFE_PATTERN = re.compile(r"\)[*+{]|\\[1-9]|\(\?(?!:)")
_MAX_PATTERN = 1000
_MAX_MATCHING_STEPS = 2e7
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED_FLAGS = {
    "layer_replication": "layer_replication",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_WHY = {
    "layer_replication": "several of its layers share one weight, which a merge would have to give "
    "several values; write the model with the copied layers out (mergekit's passthrough does), "
    "then take layer_replication out of adapter_config.json: its names are those of that model",
}


@dataclass(frozen=True)
class Scaling:
    """r and alpha per module, as PEFT resolves them."""

    label: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rank_stabilised: bool

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module or parameter."""
        return int(_first_match(self.label, self.rank_pattern, module, self.rank))

    def of(self, module: str, stored_rank: int | None) -> tuple[float, float]:
        """(scale, alpha) of one module. Raises DisagreementError when config and file differ.

        stored_rank: None where the tensors do not show it.
        """
        rank = self.rank_of(module)
        alpha = float(_first_match(self.label, self.alpha_pattern, module, self.alpha))
        if stored_rank is not None and rank != stored_rank:
            raise DisagreementError(
                f"{self.label}: {module}: the config says rank {rank}, the tensors have "
                f"{stored_rank}",
                hint="config and weights belong to different adapters, or rank_pattern is missing",
            )
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank), alpha


def read_config(label: str, side_files: Mapping[str, bytes]) -> dict[str, Any]:
    """The config. Raises UnsupportedInput for adapters not handled, MalformedFile."""
    if CONFIG_FILE not in side_files:
        raise UnsupportedInput(
            f"{label}: its keys are PEFT's, but {CONFIG_FILE} is missing",
            hint="rank alone does not give the scale; put the config beside the weights",
        )
    try:
        config = json.loads(side_files[CONFIG_FILE].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{label}: {CONFIG_FILE} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise MalformedFile(f"{label}: {CONFIG_FILE} is not a JSON object")
    if config.get("peft_type") not in READ_TYPES:
        raise UnsupportedInput(
            f"{label}: is a PEFT adapter of type {config.get('peft_type')!r}; loratool reads "
            + ", ".join(READ_TYPES)
        )
    for flag, kind in _REFUSED_FLAGS.items():
        if config.get(flag):
            raise UnsupportedInput(
                f"{label}: {kind} ({flag}) is not supported", hint=_WHY.get(flag)
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UnsupportedInput(
            f"{label}: was initialised by {init}, which changes the base as well",
            hint="save it with PEFT's path_initial_model_for_weight_conversion first",
        )
    return config


def scaling_of(label: str, config: Mapping[str, Any]) -> Scaling:
    """Rank and alpha of a LoRA, LoHa or LoKr. Raises MalformedFile for unusable values."""
    key = "lora_alpha" if config["peft_type"] == "LORA" else "alpha"
    rank, alpha = config.get("r"), config.get(key)
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MalformedFile(f"{label}: {CONFIG_FILE} has no usable r ({rank!r})")
    if not isinstance(alpha, int | float) or not _is_number(alpha):
        raise MalformedFile(f"{label}: {CONFIG_FILE} has no usable {key} ({alpha!r})")
    for pattern in patterns:
        if not isinstance(pattern, dict) or not all(_is_number(x) for x in pattern.values()):
            raise MalformedFile(f"{label}: {CONFIG_FILE} has an unusable rank or alpha pattern")
    return Scaling(label, rank, alpha, patterns[0], patterns[1], bool(config.get("use_rslora")))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _first_match(label: str, patterns: Mapping[str, Any], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the whole name or its end after a dot wins."""
    for key, value in patterns.items():
        if _steps_at_most(key, len(module)) > _MAX_MATCHING_STEPS:
            raise MalformedFile(
                f"{label}: pattern {key[:80]!r} could take forever to match; refused"
            )
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        except (re.error, RecursionError, OverflowError):
            raise MalformedFile(
                f"{label}: pattern {key[:80]!r} is not a regular expression"
            ) from None
    return default


def _steps_at_most(pattern: str, length: int) -> float:
    """How many ways a backtracking matcher may have to try on a name of this length."""
    if _UNSAFE_PATTERN.search(pattern) or len(pattern) > _MAX_PATTERN:
        return math.inf
    rest = re.sub(r"\\.|\[[^]]*\]", "x", pattern)
    steps = float(max(length, 2))  # of the prefix that PEFT puts before the pattern
    for quantifier, ways in (("*", length), ("+", length), ("{", length), ("?", 2)):
        steps *= float(ways) ** min(rest.count(quantifier), 100)
    while group := re.search(r"\(([^()]*)\)", rest):
        steps *= 1 + group[1].count("|")
        rest = f"{rest[: group.start()]}x{rest[group.end() :]}"
    return steps * (1 + rest.count("|"))
