"""The few facts of a model's ``config.json`` that decide how its weights are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_TEXT_TO_TEXT = frozenset(
    {
        "bart",
        "blenderbot",
        "led",
        "longt5",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "pegasus",
        "plbart",
        "switch_transformers",
        "t5",
        "umt5",
    }
)
"""Models whose ForConditionalGeneration takes tokens. PEFT's class for SEQ_2_SEQ_LM passes
input_ids, which speech and image models do not take."""
_IN_TWO_PARTS = frozenset({"encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says; empty when there is none."""

    values: Mapping[str, Any]

    @property
    def known(self) -> bool:
        return bool(self.values)

    @property
    def model_type(self) -> str | None:
        value = self.values.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architecture(self) -> str | None:
        """The model's class: first of ``architectures``, or diffusers' ``_class_name``."""
        listed = self.values.get("architectures")
        value = listed[0] if isinstance(listed, list) and listed else self.values.get("_class_name")
        return value if isinstance(value, str) else None

    @property
    def parts(self) -> dict[str, ModelConfig]:
        """The models that this one is made of, by the module that holds each: of any encoder and
        a language model, which transformers takes from the part's own config."""
        if self.model_type not in _IN_TWO_PARTS:
            return {}
        parts = {}
        for part, made in (("encoder", "Model"), ("decoder", "ForCausalLM")):
            values = self.values.get(part)
            values = values if isinstance(values, dict) else {}
            name = "TrOCRForCausalLM" if values.get("model_type") == "trocr" else made
            parts[part] = ModelConfig({**values, "architectures": [name]})
        return parts

    @property
    def uses_conv1d(self) -> bool | None:
        """Whether weights are stored (in, out); None when the config does not say."""
        if self.parts:
            return None
        return self.model_type in _CONV1D_MODELS if self.model_type else None

    @property
    def says_tied(self) -> bool:
        """Whether output head and input embedding are one matrix; transformers' default is yes."""
        if "decoder" in self.parts:
            return self.parts["decoder"].says_tied
        return bool(self.values.get("tie_word_embeddings", True))

    @property
    def task_type(self) -> str | None:
        """PEFT's name for the task that the architecture is for."""
        name = self.architecture or ""
        if name.endswith("ForConditionalGeneration") and self.model_type in _TEXT_TO_TEXT:
            return "SEQ_2_SEQ_LM"
        return next((task for end, task in _TASKS.items() if name.endswith(end)), None)

    @property
    def hub_name(self) -> str | None:
        """The Hub id the model was loaded from, if the config kept one."""
        value = self.values.get("_name_or_path")
        return value if isinstance(value, str) and is_hub_id(value) else None


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the form of a Hub repository id: owner/name."""
    owner, slash, name = text.partition("/")
    allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
    return (
        bool(slash and owner and name)
        and all(char in allowed for char in owner + name)
        and not owner.startswith((".", "-"))
        and not name.startswith((".", "-"))
        and len(text) <= 96
    )
