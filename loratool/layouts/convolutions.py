"""Which convolutions PEFT can adapt and merge: those without groups that are not transposed.

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
_TRANSPOSED = re.compile(r".*conv_?tr(anspose\w*)?|conv_?t\d|convt_.*|deconv|upscale_conv\d|resize")
"""Last names of transposed convolutions."""


def is_grouped(name: str, shape: tuple[int, ...], config: ModelConfig) -> bool:
    """Whether a convolution weight has, or by its shape (out, 1, k…) may have, groups."""
    if shape[1] == 1 < shape[0]:
        return True
    return re.fullmatch(_GROUPED.get(config.model_type or "", r"(?!)"), name) is not None


def is_transposed(name: str, shape: tuple[int, ...], bias: tuple[int, ...] | None) -> bool:
    """Whether a convolution weight is (in, out, k…), which PEFT has no adapter for: a bias has the
    length of the output side. bias: the shape of its module's, if there is one."""
    if bias is not None and bias[0] == shape[1] != shape[0]:
        return True
    return _TRANSPOSED.fullmatch(name.removesuffix(".weight").rpartition(".")[2]) is not None
