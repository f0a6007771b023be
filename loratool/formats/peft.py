"""PEFT's layout: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Checked against PEFT 0.21: key names, the order in which patterns are matched, and what its loader
does with each kind of key (``base_layer``, ``modules_to_save``, biases) come from its source.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratool.adapter import Adapter, LowRankUpdate, Replacement, Update, module_of
from loratool.errors import DisagreementError, MalformedFile, Unplaced, UnsupportedInput, UsageError
from loratool.formats.peft_experts import (
    EncodedParameter,
    Wrapped,
    decode_parameter,
    encode_parameters,
    is_bare,
)
from loratool.storage.tensors import LazyTensor

NAME = "PEFT"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_SAVED = re.compile(r"(.+)\.modules_to_save(?:\.default)?\.([^.]+)")
_BASE_COPY = re.compile(r"(.+)\.(?:original_module|base_layer)\.(weight|bias)")
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Top-level modules that PEFT saves whole for a task, whatever the config lists."""

_UNSAFE_PATTERN = re.compile(r"\)[*+{]|\\[1-9]|\(\?(?!:)")
_MAX_PATTERN = 1000
_MAX_MATCHING_STEPS = 2e7
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED_KEYS = {
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "lora_bias",
    "lora_diag": "KaSA",
    "trainable_tokens": "trainable tokens",
    "token_adapter": "trainable tokens",
}
_REFUSED_FLAGS = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable tokens",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
}


def detect(keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
    """A config with a peft_type, or keys with PEFT's prefix."""
    if CONFIG_FILE in side_files:
        return b'"peft_type"' in side_files[CONFIG_FILE]
    return any(key.startswith(PREFIX) and ".lora_" in key for key in keys)


# Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scaling:
    """r and alpha per module, as PEFT resolves them."""

    label: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    rank_stabilised: bool

    def of(self, module: str, stored_rank: int) -> tuple[float, float]:
        """(scale, alpha) of one module. Raises DisagreementError when config and file differ."""
        rank = self.rank_of(module)
        alpha = float(_first_match(self.label, self.alpha_pattern, module, self.alpha))
        if rank != stored_rank:
            raise DisagreementError(
                f"{self.label}: {module}: the config says rank {rank}, the tensors have "
                f"{stored_rank}",
                hint="config and weights belong to different adapters, or rank_pattern is missing",
            )
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank), alpha

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return int(_first_match(self.label, self.rank_pattern, module, self.rank))


def decode(
    label: str,
    tensors: Mapping[str, LazyTensor],
    side_files: Mapping[str, bytes],
    alpha: float | None,
) -> Adapter:
    """Read a PEFT LoRA.

    Raises UnsupportedInput for kinds of adapter not handled, MalformedFile for a config or
    factors that make no sense, Unplaced for keys of unknown meaning.
    """
    config = _config(label, side_files)
    if alpha is not None:
        raise UsageError(f"{label}: stores its own alpha; --alpha is for adapters that do not")
    scaling = _scaling(label, config)
    updates: dict[str, Update] = {}
    base_copies: dict[str, LazyTensor] = {}
    wrapped = _wrapped(label, config)
    unplaced = []
    for key in tensors:
        name = key.removeprefix(PREFIX)
        for mark, kind in _REFUSED_KEYS.items():
            if f".{mark}" in name:
                raise UnsupportedInput(f"{label}: {key}: {kind} adapters are not supported")
        if factor := _FACTOR.fullmatch(name):
            module, embedding, side = factor.groups()
            parameter = wrapped.parameter(module, tensors) if wrapped.targets else None
            if side == "A" and parameter is not None:
                updates |= _of_parameter(label, tensors, key, parameter, scaling)
            elif side == "A":
                updates[f"{module}.weight"] = _low_rank(
                    label, tensors, key, module, bool(embedding), scaling
                )
            elif _partner(key, "B", "A") not in tensors:
                raise MalformedFile(f"{label}: {key} has no lora_A beside it")
        elif saved := _SAVED.fullmatch(name):
            updates[".".join(saved.groups())] = Replacement(tensors[key])
        elif copy := _BASE_COPY.fullmatch(name):
            module, part = copy.groups()
            if part == "bias" and ".base_layer." in name:
                updates[f"{module}.bias"] = Replacement(tensors[key])
            elif ".base_layer." in name:
                base_copies[f"{module}.weight"] = tensors[key]
        elif key.startswith(PREFIX) and not any(
            part.startswith("lora_") for part in name.split(".")
        ):
            updates.setdefault(name, Replacement(tensors[key]))
        else:
            unplaced.append(key)
    if unplaced:
        raise Unplaced(
            f"{label}: {len(unplaced)} tensors have no known meaning in a PEFT LoRA",
            details=unplaced[:12],
        )
    return Adapter(
        updates,
        NAME,
        base_model=_text(config.get("base_model_name_or_path")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        task_type=_text(config.get("task_type")),
        base_copies=base_copies,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _config(label: str, side_files: Mapping[str, bytes]) -> dict[str, Any]:
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
    if config.get("peft_type") != "LORA":
        raise UnsupportedInput(
            f"{label}: is a PEFT adapter of type {config.get('peft_type')!r}; loratool reads LORA"
        )
    for flag, kind in _REFUSED_FLAGS.items():
        if config.get(flag):
            raise UnsupportedInput(f"{label}: {kind} ({flag}) is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING_INITS):
        raise UnsupportedInput(
            f"{label}: was initialised by {init}, which changes the base as well",
            hint="save it with PEFT's path_initial_model_for_weight_conversion first",
        )
    return config


def _scaling(label: str, config: Mapping[str, Any]) -> _Scaling:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise MalformedFile(f"{label}: {CONFIG_FILE} has no usable r ({rank!r})")
    if not isinstance(alpha, int | float) or not _is_number(alpha):
        raise MalformedFile(f"{label}: {CONFIG_FILE} has no usable lora_alpha ({alpha!r})")
    for pattern in patterns:
        if not isinstance(pattern, dict) or not all(_is_number(x) for x in pattern.values()):
            raise MalformedFile(f"{label}: {CONFIG_FILE} has an unusable rank or alpha pattern")
    return _Scaling(label, rank, alpha, patterns[0], patterns[1], bool(config.get("use_rslora")))


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


def _wrapped(label: str, config: Mapping[str, Any]) -> Wrapped:
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise MalformedFile(f"{label}: {CONFIG_FILE} has an unusable target_parameters")
    return Wrapped(label, tuple(targets))


def _of_parameter(
    label: str, tensors: Mapping[str, LazyTensor], key: str, name: str, scaling: _Scaling
) -> dict[str, LowRankUpdate]:
    b = tensors.get(_partner(key, "A", "B"))
    if b is None:
        raise MalformedFile(f"{label}: {key} has no lora_B beside it")
    rank = scaling.rank_of(name)
    scale, alpha = scaling.of(name, rank)
    return decode_parameter(label, name, tensors[key], b, rank=rank, scale=scale, alpha=alpha)


def _partner(key: str, side: str, other: str) -> str:
    head, _, tail = key.rpartition(f"_{side}")
    return f"{head}_{other}{tail}"


def _low_rank(
    label: str,
    tensors: Mapping[str, LazyTensor],
    key: str,
    module: str,
    is_embedding: bool,
    scaling: _Scaling,
) -> LowRankUpdate:
    a, b = tensors[key], tensors.get(_partner(key, "A", "B"))
    if b is None:
        raise MalformedFile(f"{label}: {key} has no lora_B beside it")
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or (is_embedding and len(a.shape) > 2):
        raise MalformedFile(
            f"{label}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)}"
        )
    if len(a.shape) > 2 and a.shape[0] != b.shape[1] and b.shape[1] and not a.shape[0] % b.shape[1]:
        raise UnsupportedInput(
            f"{label}: {module}: is a grouped convolution (lora_B {list(b.shape)} for rank "
            f"{a.shape[0]}); PEFT itself does not merge those",
        )
    if a.shape[0] != b.shape[1] or a.shape[0] == 0 or any(side != 1 for side in b.shape[2:]):
        raise MalformedFile(
            f"{label}: {module}: lora_B {b.shape} and lora_A {a.shape} do not chain"
        )
    scale, alpha = scaling.of(module, a.shape[0])
    return LowRankUpdate(b, a, scale, alpha, is_embedding)


# Writing --------------------------------------------------------------------------------------


def encode(
    adapter: Adapter, base_modules: Iterable[str] | None
) -> tuple[dict[str, LazyTensor], dict[str, bytes]]:
    """The tensors and side files of a PEFT adapter.

    base_modules: every module of the base model that owns a weight, so that a short name in the
    config ("c_attn") is used only where it means exactly the adapted modules; None where the base
    is not known: the config then lists full names. Raises Unplaced for a replaced parameter that
    no PEFT mechanism stores.
    """
    modules = None if base_modules is None else set(base_modules)
    bare = {name: update for name, update in adapter.low_rank.items() if is_bare(name)}
    low_rank = {module_of(n): update for n, update in adapter.low_rank.items() if n not in bare}
    saved = {module_of(name) for name in adapter.replacements if name.endswith(".weight")}
    tensors: dict[str, LazyTensor] = {}
    for module, update in low_rank.items():
        kind = "lora_embedding_{}" if update.is_embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{module}.{kind.format('A')}"] = update.a
        tensors[f"{PREFIX}{module}.{kind.format('B')}"] = update.b
    parameters = list(encode_parameters(bare))
    for parameter in parameters:
        tensors[f"{PREFIX}{parameter.owner}.lora_A.weight"] = parameter.a
        tensors[f"{PREFIX}{parameter.owner}.lora_B.weight"] = parameter.b
    has_bias = False
    for name, replacement in adapter.replacements.items():
        module, _, part = name.rpartition(".")
        if part not in ("weight", "bias") or not module:
            raise Unplaced(f"{name}: PEFT cannot store a parameter that is no weight or bias")
        if module in low_rank and part == "weight":
            raise Unplaced(f"{name}: is both updated and replaced")
        bias_alone = part == "bias" and module not in saved
        has_bias |= bias_alone
        owner = f"{module}.base_layer" if module in low_rank else module
        tensors[f"{PREFIX}{owner if bias_alone else module}.{part}"] = replacement.value
    heads = TASK_HEADS.get(adapter.task_type or "", ())
    roots = {module.split(".")[0] for module in saved} & set(heads)
    saved = {module for module in saved if module.split(".")[0] not in roots}
    config = _config_of(adapter, low_rank, parameters, modules, saved, roots, has_bias)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return dict(sorted(tensors.items())), {CONFIG_FILE: text.encode()}


def _config_of(
    adapter: Adapter,
    low_rank: Mapping[str, LowRankUpdate],
    parameters: Sequence[EncodedParameter],
    modules: set[str] | None,
    saved: set[str],
    heads: set[str],
    has_bias: bool,
) -> dict[str, Any]:
    by_name: dict[str, LowRankUpdate | EncodedParameter] = {**low_rank}
    by_name |= {parameter.name: parameter for parameter in parameters}
    ranks = {name: update.rank for name, update in by_name.items()}
    stabilised = bool(by_name) and all(
        update.scale == update.alpha / math.sqrt(update.rank) != update.alpha / update.rank
        for update in by_name.values()
    )
    alphas = {
        module: update.alpha
        if stabilised or update.scale == update.alpha / update.rank
        else update.scale * update.rank
        for module, update in by_name.items()
    }
    rank = _most_common(ranks.values(), default=1)
    alpha = _most_common(alphas.values(), default=1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base_model,
        "task_type": adapter.task_type,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "target_modules": _target_modules(set(low_rank), modules),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "bias": "all" if has_bias else "none",
    }
    if parameters:
        config["target_parameters"] = sorted(parameter.name for parameter in parameters)
    if saved or heads:
        config["modules_to_save"] = sorted(heads) + short_names(saved, modules)
    suffixes = {suffix for module in by_name for suffix in _proper_suffixes(module)}

    def exactly(module: str) -> str:
        return ("^" if module in suffixes else "") + re.escape(module)

    odd_ranks = {exactly(m): r for m, r in sorted(ranks.items()) if r != rank}
    odd_alphas = {exactly(m): _plain(x) for m, x in sorted(alphas.items()) if x != alpha}
    if stabilised:
        config["use_rslora"] = True
    if odd_ranks:
        config["rank_pattern"] = odd_ranks
    if odd_alphas:
        config["alpha_pattern"] = odd_alphas
    return config


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _most_common(values: Iterable[Any], default: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _proper_suffixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _target_modules(chosen: set[str], modules: set[str] | None) -> list[str] | str:
    """Names that PEFT expands to exactly ``chosen``; a pattern where no names do."""
    if modules is None:
        return sorted(chosen)
    names = short_names(chosen, modules)
    listed = set(names)
    if any(suffix in listed for other in modules - chosen for suffix in _proper_suffixes(other)):
        return "|".join(re.escape(module) for module in sorted(chosen))
    return names


def short_names(chosen: set[str], modules: set[str] | None) -> list[str]:
    """The fewest names that stand for ``chosen`` within ``modules`` by PEFT's suffix match.

    The last component stands for its modules where all that bear it are chosen; elsewhere the
    full names are listed, as all are where ``modules`` is not known.
    """
    if modules is None:
        return sorted(chosen)
    left_out = {module.rpartition(".")[2] for module in modules - chosen}
    short = {
        last
        for last in {module.rpartition(".")[2] for module in chosen}
        if not last.isdigit() and not any(other.endswith(last) for other in left_out)
    }
    lasts = {module: module.rpartition(".")[2] for module in chosen}
    return sorted({last if last in short else module for module, last in lasts.items()})
