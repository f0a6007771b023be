"""Output heads that are the input embedding under another name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loratool.adapter import ModuleKind, module_of
from loratool.layouts.config import ModelConfig

_HEADS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "output.weight",
)
_DECODER_HEADS = {
    "BertForMaskedLM": "cls.predictions.decoder.weight",
    "RobertaForMaskedLM": "lm_head.decoder.weight",
}


@dataclass(frozen=True)
class TiedPair:
    """Two parameter names for one matrix. ``head_stored``: the file holds the second one too."""

    embedding: str
    head: str
    head_stored: bool


def find_tie(
    names: Collection[str], kinds: dict[str, ModuleKind], config: ModelConfig
) -> TiedPair | None:
    """The tied pair of a model with these parameter names, or None.

    Tied means: the config does not deny it, the architecture is one with an output head over the
    vocabulary, and there is exactly one input embedding.
    """
    embeddings = [name for name, kind in kinds.items() if kind is ModuleKind.EMBEDDING]
    if len(embeddings) != 1 or not config.says_tied:
        return None
    stored = [head for head in _HEADS if head in names]
    architecture = config.architecture or ""
    if stored:
        return TiedPair(embeddings[0], stored[0], True) if config.known else None
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return TiedPair(embeddings[0], "lm_head.weight", False)
    if architecture in _DECODER_HEADS:
        return TiedPair(embeddings[0], _DECODER_HEADS[architecture], False)
    return None


def head_module(pair: TiedPair) -> str:
    """The head's module name."""
    return module_of(pair.head)
