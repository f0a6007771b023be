"""Writing a PEFT adapter: which keys, and a config that means exactly these modules."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    LowRankUpdate,
    TokenRows,
    module_of,
)
from loratool.errors import Unplaced
from loratool.formats.peft_beside import beside_factors
from loratool.formats.peft_config import CONFIG_FILE, TASK_HEADS
from loratool.formats.peft_experts import EncodedParameter, encode_parameters, is_bare
from loratool.formats.peft_keys import PREFIX
from loratool.storage.tensors import LazyTensor


def encode(
    adapter: Adapter, base_modules: Iterable[str] | None
) -> tuple[dict[str, LazyTensor], dict[str, bytes]]:
    """The tensors and side files of a PEFT adapter.

    base_modules: every module of the base model that owns a weight, so that a short name in the
    config ("c_attn") is used only where it means exactly the adapted modules; None where the base
    is not known: the config then lists full names. Raises Unplaced for a replaced parameter that
    no PEFT mechanism stores.
    """
    tokens = {name: u for name, u in adapter.others.items() if isinstance(u, TokenRows)}
    check_kinds(adapter)
    modules = None if base_modules is None else set(base_modules)
    if tokens and len(tokens) == len(adapter.updates) and _same_tokens(tokens):
        return _tokens_alone(adapter, tokens, modules)
    factors = adapter.factors
    bare = {
        name: update
        for name, update in factors.items()
        if is_bare(name) or name in adapter.as_parameters
    }
    low_rank = {module_of(n): update for n, update in factors.items() if n not in bare}
    saved = _saved_modules(adapter)
    tensors: dict[str, LazyTensor] = {}
    for module, update in low_rank.items():
        kind = "lora_embedding_{}" if update.is_embedding else "lora_{}.weight"
        tensors[f"{PREFIX}{module}.{kind.format('A')}"] = update.a
        tensors[f"{PREFIX}{module}.{kind.format('B')}"] = update.b
    parameters = list(encode_parameters(bare))
    beside, settings = beside_factors(adapter, low_rank)
    if beside and parameters:
        raise Unplaced(
            f"{parameters[0].name}: PEFT has no DoRA and no lora_bias of bare parameters"
        )
    tensors |= beside
    for parameter in parameters:
        tensors[f"{PREFIX}{parameter.owner}.lora_A.weight"] = parameter.a
        tensors[f"{PREFIX}{parameter.owner}.lora_B.weight"] = parameter.b
    for name, rows in tokens.items():
        tensors[f"{PREFIX}{module_of(name)}.token_adapter.trainable_tokens_delta"] = rows.value
    adapted = {*low_rank, *(module_of(parameter.name) for parameter in parameters)}
    has_bias = False
    for name, replacement in adapter.replacements.items():
        module, _, part = name.rpartition(".")
        if not module:
            raise Unplaced(f"{name}: PEFT cannot store a parameter of the model itself")
        if module in low_rank and part != "bias":
            raise Unplaced(f"{name}: its module is both updated and replaced")
        bias_alone = part == "bias" and not _lies_in(saved, name)
        has_bias |= bias_alone
        owner = f"{module}.base_layer" if module in adapted else module
        tensors[f"{PREFIX}{owner if bias_alone else module}.{part}"] = replacement.value
    heads = TASK_HEADS.get(adapter.task_type or "", ())
    roots = {module.split(".")[0] for module in saved} & set(heads)
    saved = {module for module in saved if module.split(".")[0] not in roots}
    config = _config_of(adapter, low_rank, parameters, modules, saved, roots, has_bias) | settings
    if tokens:
        config["trainable_token_indices"] = {
            module_of(name): list(rows.indices) for name, rows in tokens.items()
        }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return dict(sorted(tensors.items())), {CONFIG_FILE: text.encode()}


def _same_tokens(tokens: Mapping[str, TokenRows]) -> bool:
    return len({rows.indices for rows in tokens.values()}) == 1


def _tokens_alone(
    adapter: Adapter, tokens: Mapping[str, TokenRows], modules: set[str] | None
) -> tuple[dict[str, LazyTensor], dict[str, bytes]]:
    """PEFT has a type for it: it loads no LORA that targets nothing."""
    tables = {module_of(name): rows for name, rows in tokens.items()}
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "base_model_name_or_path": adapter.base_model,
        "task_type": adapter.task_type,
        "inference_mode": True,
        "token_indices": list(next(iter(tables.values())).indices),
        "target_modules": _target_modules(set(tables), modules),
    }
    tensors: dict[str, LazyTensor] = {
        f"{PREFIX}{table}.trainable_tokens_delta": rows.value
        for table, rows in sorted(tables.items())
    }
    return tensors, {CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def check_kinds(adapter: Adapter) -> None:
    """Raises Unplaced for kinds of updates that are not written."""
    for name, other in adapter.others.items():
        if not isinstance(other, DoraUpdate | DenseUpdate | TokenRows):
            raise Unplaced(
                f"{name}: {other.describe()}: is not written in this form",
                hint="loratool resize --rank full makes a plain LoRA of LoHa and LoKr",
            )


def _saved_modules(adapter: Adapter) -> set[str]:
    """The outermost modules that are stored whole: owners of replaced weights, and of replaced
    parameters that are no weight or bias."""
    owners = {module_of(name) for name in adapter.replacements if not name.endswith(".bias")}
    return {owner for owner in owners if not _lies_in(owners, owner)}


def _lies_in(modules: Collection[str], name: str) -> bool:
    while name := module_of(name):
        if name in modules:
            return True
    return False


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
