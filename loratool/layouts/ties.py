"""Parameters that go by several names: heads that are the embedding, shared tables, tied biases.

transformers keeps one value behind all names of a tie, and a file usually holds the first only.
Which names belong together is read off the names that are there and the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loratool.adapter import ModuleKind, module_of
from loratool.layouts.config import ModelConfig
from loratool.storage.tensors import LazyTensor, equal_values

_DECODER_HEADS = {
    "cls.predictions.transform.dense.weight": "cls.predictions.decoder.weight",
    "lm_head.dense.weight": "lm_head.decoder.weight",
    "predictions.dense.weight": "predictions.decoder.weight",
    "vocab_transform.weight": "vocab_projector.weight",
    "generator_predictions.dense.weight": "generator_lm_head.weight",
}
"""Heads of masked language models, by a weight that stands before them."""

_HEADS_OF: dict[str, str | None] = {
    "BertForMaskedLM": "cls.predictions.decoder.weight",
    "BertForPreTraining": "cls.predictions.decoder.weight",
    "BertLMHeadModel": "cls.predictions.decoder.weight",
    "DebertaForMaskedLM": "cls.predictions.decoder.weight",
    "DebertaV2ForMaskedLM": "cls.predictions.decoder.weight",
    "RobertaForMaskedLM": "lm_head.decoder.weight",
    "RobertaForCausalLM": "lm_head.decoder.weight",
    "XLMRobertaForMaskedLM": "lm_head.decoder.weight",
    "DistilBertForMaskedLM": "vocab_projector.weight",
    "ElectraForMaskedLM": "generator_lm_head.weight",
    "AlbertForMaskedLM": "predictions.decoder.weight",
    "BertGenerationDecoder": "lm_head.decoder.weight",
    "BioGptForCausalLM": "output_projection.weight",
    "Blip2ForConditionalGeneration": "language_model.lm_head.weight",
    "BlipForConditionalGeneration": "text_decoder.cls.predictions.decoder.weight",
    "BlipForQuestionAnswering": "text_decoder.cls.predictions.decoder.weight",
    "FlaubertWithLMHeadModel": "pred_layer.proj.weight",
    "FunnelForMaskedLM": "lm_head.weight",
    "GPTNeoXJapaneseForCausalLM": "embed_out.weight",
    "InstructBlipForConditionalGeneration": "language_model.lm_head.weight",
    "InstructBlipVideoForConditionalGeneration": "language_model.lm_head.weight",
    "Kosmos2_5ForConditionalGeneration": "text_model.lm_head.weight",
    "Kosmos2ForConditionalGeneration": "text_model.lm_head.weight",
    "MarianMTModel": "lm_head.weight",
    "ModernBertDecoderForCausalLM": "decoder.weight",
    "ModernBertForMaskedLM": "decoder.weight",
    "MoonshineForConditionalGeneration": "proj_out.weight",
    "MusicgenForConditionalGeneration": None,
    "MusicgenMelodyForConditionalGeneration": None,
    "SeamlessM4TForSpeechToText": "lm_head.weight",
    "SeamlessM4TForTextToText": "lm_head.weight",
    "SeamlessM4Tv2ForSpeechToText": "lm_head.weight",
    "SeamlessM4Tv2ForTextToText": "lm_head.weight",
    "SpeechT5ForSpeechToText": "text_decoder_postnet.lm_head.weight",
    "T5GemmaForConditionalGeneration": "lm_head.out_proj.weight",
    "TrOCRForCausalLM": "output_projection.weight",
    "WhisperForCausalLM": "proj_out.weight",
    "WhisperForConditionalGeneration": "proj_out.weight",
    "XLMWithLMHeadModel": "pred_layer.proj.weight",
    "XLNetLMHeadModel": "lm_loss.weight",
}
"""Heads by architecture, where their names do not follow from its own; None: none over tokens."""
_STORED_HEADS = (
    "lm_head.weight",
    *_DECODER_HEADS.values(),
    "embed_out.weight",
    "proj_out.weight",
    "output.weight",
)
_IN_DECODER = re.compile(r"(?:^|[._])decoder\.")
_SIDES = ("encoder.", "decoder.", "text_encoder.", "text_decoder.")
_WITH_LM_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SHARED_EMBEDDING = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
"""Of SAM, in one module under two names."""
_WITHOUT_DECODER_BIAS = frozenset({"EsmForMaskedLM", "LxmertForPreTraining"})


@dataclass(frozen=True)
class Tie:
    """The names of one parameter. The first is always stored; ``stored`` has all that are."""

    names: tuple[str, ...]
    stored: frozenset[str]

    @property
    def main(self) -> str:
        return self.names[0]

    def __str__(self) -> str:
        return " = ".join(self.names)


def find_ties(
    names: Collection[str], kinds: Mapping[str, ModuleKind], config: ModelConfig
) -> tuple[Tie, ...]:
    """The ties of a model with these parameter names.

    A name that is not stored and must be there is tied; one that is stored is tied unless the
    config denies it. Without a config nothing is known to be tied.
    """
    if not config.known:
        return ()
    names = set(names)
    ties = []
    for group in _groups(names, kinds, config):
        present = [name for name in group if name in names]
        if not config.says_tied:
            present = present[:1]
        tied = [name for name in group if name in present or name not in names]
        if present and len(tied) > 1:
            order = present[:1] + [name for name in tied if name != present[0]]
            ties.append(Tie(tuple(order), frozenset(present)))
    return tuple(ties)


def _groups(
    names: set[str], kinds: Mapping[str, ModuleKind], config: ModelConfig
) -> Iterator[list[str]]:
    """Names that belong together if they are tied, the usual main name first."""
    tables = [name for name, kind in kinds.items() if kind is ModuleKind.EMBEDDING]
    shared = [name for name in tables if f".{name}".endswith(".shared.weight")]
    if len(tables) > 1:
        tables = [name for name in tables if _IN_DECODER.search(name)]
    group = tables if len(tables) == 1 else []
    if len(shared) == 1:
        stem = shared[0].removesuffix("shared.weight")
        sides = [f"{stem}{side}" for side in _SIDES]
        group = shared + [
            f"{side}embed_tokens.weight"
            for side in sides
            if any(name.startswith(side) for name in names)
        ]
    head = output_head(names, config)
    if group and head is not None and config.says_tied:
        group = [*group, head]
    yield group
    if _SHARED_EMBEDDING[0] in names:
        yield list(_SHARED_EMBEDDING)
    parent, _, last = module_of(head or "").rpartition(".")
    if (
        last == "decoder"
        and f"{parent}.bias" in names
        and config.architecture not in _WITHOUT_DECODER_BIAS
    ):
        yield [f"{parent}.bias", f"{parent}.decoder.bias"]


def output_head(names: Collection[str], config: ModelConfig) -> str | None:
    """The output head over the vocabulary, which may be tied, or None."""
    if "decoder" in config.parts:
        parts = [name.removeprefix("decoder.") for name in names if name.startswith("decoder.")]
        head = output_head(parts, config.parts["decoder"])
        return None if head is None else f"decoder.{head}"
    architecture = config.architecture or ""
    if architecture in _HEADS_OF:
        known = _HEADS_OF[architecture]
        return None if known is None else _behind_a_prefix(known, names)
    for before, after in _DECODER_HEADS.items():
        if before in names:
            return after
    stored = next((head for head in _STORED_HEADS if head in names), None)
    if stored is not None:
        return stored
    if architecture.endswith(_WITH_LM_HEAD):
        return _behind_a_prefix("lm_head.weight", names)
    return None


def _behind_a_prefix(head: str, names: Collection[str]) -> str:
    """The stored name that is this one behind what all names begin with (``module.``), if there
    is one: it is not another matrix."""
    found = (name for name in names if name.endswith(f".{head}"))
    for name in found:
        prefix = name.removesuffix(head)
        if all(other.startswith(prefix) for other in names):
            return name
    return head


def same_values(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two stored tensors are equal: transformers ties those stored under both names."""
    return one.dtype == two.dtype and equal_values(one, two)
