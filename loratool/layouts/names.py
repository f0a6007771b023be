"""Finding the same parameter under two namings that differ by a prefix.

Checkpoints of one model come with and without the head model's prefix (``transformer.h.0…`` or
``h.0…``), and adapters name modules of the model they were trained on. One prefix is allowed to
differ, it must be the same for every name, and its use is reported: it is a guess.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loratool.layouts.config import ModelConfig
from loratool.storage.tensors import TensorInfo

_MODEL_PREFIXES = {
    "gpt2": "transformer.",
    "gpt_neo": "transformer.",
    "gptj": "transformer.",
    "bloom": "transformer.",
    "falcon": "transformer.",
    "gpt_neox": "gpt_neox.",
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "deberta": "deberta.",
    "deberta-v2": "deberta.",
    "distilbert": "distilbert.",
    "electra": "electra.",
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "qwen3": "model.",
    "gemma": "model.",
    "gemma2": "model.",
    "gemma3_text": "model.",
    "phi": "model.",
    "phi3": "model.",
    "opt": "model.",
    "mixtral": "model.",
    "qwen2_moe": "model.",
    "qwen3_moe": "model.",
    "albert": "albert.",
    "xlm-roberta-xl": "roberta.",
    "vit": "vit.",
    "deit": "deit.",
    "whisper": "model.",
    "bart": "model.",
    "mbart": "model.",
}
"""transformers' base_model_prefix: what a head model's names start with and a bare one's lack."""

_PREFIXES_OF = dict.fromkeys(
    [f"{name}ForQuestionAnswering" for name in ("Llama", "Qwen2", "Qwen3", "Qwen3Moe")],
    "transformer.",
) | {"WhisperForAudioClassification": ""}
"""Of architectures whose prefix is another than their model_type's."""

_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
)
"""What torch and PEFT put before every name of a model that they wrap; no module is called so."""


@dataclass(frozen=True)
class NameMatch:
    """How names of one side are found on the other.

    found: name → the other side's name. missing: names without counterpart. note: the guess that
    was made, for the report, or None when all names are equal.
    """

    found: dict[str, str]
    missing: tuple[str, ...]
    note: str | None


def match_names(names: Iterable[str], targets: Collection[str]) -> NameMatch:
    """Find each name among ``targets``, equal or with one common prefix added or removed."""
    names = list(names)
    target_set = set(targets)
    left = [name for name in names if name not in target_set]
    found = {name: name for name in names if name in target_set}
    if not left:
        return NameMatch(found, (), None)
    free = target_set - set(found.values())
    change = _best_prefix(left, free)
    if change is not None:
        found |= {name: change.apply(name) for name in left if change.apply(name) in free}
    missing = tuple(name for name in left if name not in found)
    note = change.describe() if change is not None and len(missing) < len(left) else None
    return NameMatch(found, missing, note)


@dataclass(frozen=True)
class _PrefixChange:
    removed: str
    added: str

    def apply(self, name: str) -> str:
        if self.removed and not name.startswith(self.removed):
            return name
        return self.added + name.removeprefix(self.removed)

    def describe(self) -> str:
        if self.removed:
            return f"the prefix {self.removed!r} was removed to match names"
        return f"the prefix {self.added!r} was added to match names"


def _best_prefix(names: list[str], targets: set[str]) -> _PrefixChange | None:
    votes: Counter[_PrefixChange] = Counter()
    prefixes: dict[str, list[str]] = {}
    for target in targets:
        for prefix, rest in _splits(target):
            prefixes.setdefault(rest, []).append(prefix)
    for name in names:
        votes.update(_PrefixChange("", prefix) for prefix in prefixes.get(name, ()))
        votes.update(_PrefixChange(prefix, "") for prefix, rest in _splits(name) if rest in targets)
    if not votes:
        return None
    (best, count), *others = votes.most_common(2)
    return best if not others or others[0][1] < count else None


def _splits(name: str) -> list[tuple[str, str]]:
    """Every way to take whole components off the front: ``a.b.c`` → (a., b.c), (a.b., c)."""
    parts = name.split(".")
    rests = [".".join(parts[start:]) for start in range(1, len(parts))]
    return [(name.removesuffix(rest), rest) for rest in rests]


def _tail(name: str) -> str:
    return ".".join(name.rsplit(".", 3)[-3:])


def near_misses(name: str, targets: Collection[str]) -> list[str]:
    """Up to three targets that look like ``name``."""
    alike = [target for target in targets if _tail(target) == _tail(name)][:200]
    return difflib.get_close_matches(name, alike or list(targets)[:2000], n=3, cutoff=0.4)


def near_components(word: str, names: Iterable[str]) -> list[str]:
    """Up to three single components of dotted names that look like ``word``."""
    components = {part for name in names for part in name.split(".")}
    return difflib.get_close_matches(word, sorted(components), n=3, cutoff=0.6)


def unwrapped(
    tensors: Mapping[str, TensorInfo], side: str
) -> tuple[Mapping[str, TensorInfo], list[str]]:
    """The tensors without what a wrapper put before all their names, and what there is to say.
    side: base or tuned."""
    wrapper = _wrapper_of(tensors)
    if not wrapper:
        return tensors, []
    note = f"the prefix {wrapper!r} in {side} was left out: a wrapper's, and no part of the model's"
    return {name.removeprefix(wrapper): info for name, info in tensors.items()}, [note]


def _wrapper_of(names: Collection[str]) -> str:
    """The wrappers' prefix that all names bear, or ''."""
    prefix = ""
    while names and (
        found := next((w for w in _WRAPPERS if all(n.startswith(prefix + w) for n in names)), "")
    ):
        prefix += found
    return prefix


def model_name(ours: str, theirs: str, names: Collection[str], config: ModelConfig) -> str:
    """Which of two names of a parameter, equal but for a prefix, the base's full model has.

    names: all of the side with the shorter one. The longer where the prefix is a head model's and
    these lack it, since transformers adds it on loading; the shorter where it stands twice. Else
    the base's: the adapter is for the base.
    """
    shorter, longer = sorted((ours, theirs), key=len)
    prefix = longer.removesuffix(shorter)
    known = _prefix_of(config)
    possible = (known,) if known else tuple(_MODEL_PREFIXES.values())
    if prefix not in possible:
        return ours
    if not any(name.startswith(possible) for name in names):
        return longer
    return shorter if any(name.startswith(prefix) for name in names) else ours


def _prefix_of(config: ModelConfig) -> str:
    usual = _MODEL_PREFIXES.get(config.model_type or "", "")
    return _PREFIXES_OF.get(config.architecture or "", usual)


def head_model_prefix(names: Collection[str], config: ModelConfig) -> str:
    """The prefix that the head model of the config has and these names lack, or ''.

    transformers adds it on loading, so PEFT sees names with it.
    """
    prefix = _prefix_of(config)
    architecture = config.architecture or ""
    is_head_model = bool(architecture) and not (
        architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    )
    if not prefix or not is_head_model or any(name.startswith(prefix) for name in names):
        return ""
    return prefix
