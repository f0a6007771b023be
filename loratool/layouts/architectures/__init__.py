"""Names and shapes of a model's parameters from its ``config.json`` alone, one file per family."""

from loratool.layouts.architectures import bert, deberta, gpt2, gpt_neox, llama, opt  # noqa: F401
from loratool.layouts.architectures.registry import known_model_types, parameters_of

__all__ = ["known_model_types", "parameters_of"]
