"""What people mean by --targets: parts of a model by role rather than by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from loratool.adapter import ModuleKind, module_of
from loratool.errors import NothingMatches, UsageError
from loratool.layouts.names import near_components
from loratool.layouts.patterns import matches

_ATTENTION = {
    "attn",
    "self_attn",
    "cross_attn",
    "encoder_attn",
    "attention",
    "self_attention",
    "crossattention",
    "SelfAttention",
    "EncDecAttention",
    "attn1",
    "attn2",
}
_MLP = {
    "mlp",
    "ffn",
    "ff",
    "feed_forward",
    "feedforward",
    "DenseReluDense",
    "intermediate",
    "fc1",
    "fc2",
    "experts",
    "shared_expert",
    "block_sparse_moe",
}
_LINEAR = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.EXPERT)
_HEADS = {"lm_head", "embed_out", "classifier", "score", "qa_outputs"}
_ALIASES = {
    "q": ("q", "q_proj", "query", "query_proj", "to_q", "q_lin"),
    "k": ("k", "k_proj", "key", "key_proj", "to_k", "k_lin"),
    "v": ("v", "v_proj", "value", "value_proj", "to_v", "v_lin"),
    "o": ("o", "o_proj", "out_proj", "to_out.0", "out_lin", "attention.output.dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "wi"),
    "down": ("down_proj", "w2", "fc2", "mlp.c_proj", "wo"),
}
_REGEX_SIGNS = re.compile(r"^\.\*|[\\^$|()+]")
"""What no glob over dotted names has."""


def targeted(text: str, kinds: Mapping[str, ModuleKind]) -> set[str]:
    """Names of the parameters that ``text`` means.

    ``attention``, ``mlp``, ``all-linear`` (every linear layer but output heads), ``all-conv``,
    names, q, k, v, o, gate, up, down, a comma-separated list of these, or a regular expression
    that covers the whole module name. The experts of a mixture are linear layers, of its mlp.
    Raises NothingMatches, and UsageError for an expression that does not compile.
    """
    if _REGEX_SIGNS.search(text):
        chosen = {name for name in kinds if _compiled(text).fullmatch(module_of(name))}
        if not chosen:
            raise _nothing(text, kinds)
        return chosen
    chosen = set()
    for word in filter(None, (part.strip() for part in text.split(","))):
        found = _meant_by(word, kinds)
        if not found:
            raise _nothing(word, kinds)
        chosen |= found
    if not chosen:
        raise _nothing(text, kinds)
    return chosen


def _meant_by(word: str, kinds: Mapping[str, ModuleKind]) -> set[str]:
    matrices = {
        name
        for name, kind in kinds.items()
        if kind in (*_LINEAR, ModuleKind.CONV, ModuleKind.EMBEDDING)
    }
    if word == "attention":
        return {name for name in matrices if _parts(name) & _ATTENTION}
    if word == "mlp":
        return {name for name in matrices if not _parts(name) & _ATTENTION and _is_mlp(name)}
    if word == "all-linear":
        return {name for name in matrices if kinds[name] in _LINEAR and not _parts(name) & _HEADS}
    if word == "all-conv":
        return {name for name in matrices if kinds[name] is ModuleKind.CONV}
    named = _named(_ALIASES.get(word, (word,)), kinds)
    if not named:  # another family's name for the role: query for q_proj
        role = next((names for names in _ALIASES.values() if word in names), ())
        named = _named(role, kinds)
    return named


def _named(aliases: Iterable[str], kinds: Mapping[str, ModuleKind]) -> set[str]:
    return {name for name in kinds if any(matches(alias, name) for alias in aliases)}


def _parts(name: str) -> set[str]:
    return set(name.split("."))


def _is_mlp(name: str) -> bool:
    # BERT's second half of the block is encoder.layer.N.output.dense
    return bool(_parts(name) & _MLP) or re.search(r"\.\d+\.output\.dense\.", name) is not None


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"--targets {text!r} is not a regular expression ({error})") from None


def _nothing(text: str, kinds: Mapping[str, ModuleKind]) -> NothingMatches:
    return NothingMatches(
        f"--targets {text!r} matches nothing",
        details=[f"closest: {name}" for name in near_components(text, kinds)],
        hint="try attention, mlp, all-linear, all-conv, a list like q,v, or a regular expression "
        "for whole names of modules, such as '.*(q|v)_proj'",
    )
