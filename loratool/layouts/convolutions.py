"""Which convolutions PEFT can adapt and merge: those without groups.

A grouped convolution's weight is (out, in/groups, k…). PEFT builds lora_A for all input channels
and merges no adapter of a grouped one, so factors of such a weight would not load. Shapes show
only the extreme case of one channel per group; the others are known by architecture.
"""

from __future__ import annotations

import re

from loratool.layouts.config import ModelConfig

_GROUPED = {
    "regnet": r".*\.layer\.1\.convolution\.weight",
    "data2vec-audio": r".*\.pos_conv_embed\..*",
    "squeezebert": r".*",
}
"""model_type → names of its grouped convolutions with more than one channel per group."""


def is_grouped(name: str, shape: tuple[int, ...], config: ModelConfig) -> bool:
    """Whether a convolution weight has, or by its shape (out, 1, k…) may have, groups."""
    if shape[1] == 1 < shape[0]:
        return True
    return re.fullmatch(_GROUPED.get(config.model_type or "", r"(?!)"), name) is not None
