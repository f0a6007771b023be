"""Names in files that differ from the names of the modules they are loaded into.

transformers 5 renamed modules and goes on writing the old names. PEFT adapts modules, so an
adapter uses the new names; older adapters use the old ones. Both are read, the new ones written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratool.layouts.config import ModelConfig

_VIT = (
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"(\.layers\.\d+\.attention\.)query\.", r"\1q_proj."),
    (r"(\.layers\.\d+\.attention\.)key\.", r"\1k_proj."),
    (r"(\.layers\.\d+\.attention\.)value\.", r"\1v_proj."),
    (r"(\.layers\.\d+\.attention\.)output\.dense\.", r"\1o_proj."),
    (r"(\.layers\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(\.layers\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
)
_BLOCK_SPARSE = ((r"\.block_sparse_moe\.", ".mlp."),)
_GRANITE = (
    (r"(\.block_sparse_moe)\.input_linear\.weight$", r"\1.experts.gate_up_proj"),
    (r"(\.block_sparse_moe)\.output_linear\.weight$", r"\1.experts.down_proj"),
    (r"(\.block_sparse_moe)\.router\.layer\.weight$", r"\1.router.weight"),
)
_RENAMES = {
    "gpt_neox": ((r"^\.embed_out\.", ".lm_head."),),
    "vit": _VIT,
    "deit": _VIT,
    "vit_msn": _VIT,
    "mixtral": _BLOCK_SPARSE,
    "minimax": _BLOCK_SPARSE,
    "minimax_m2": _BLOCK_SPARSE,
    "phimoe": (*_BLOCK_SPARSE, (r"(\.mlp)\.gate\.weight$", r"\1.router.weight")),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
}
"""model_type → (pattern, replacement), applied in turn to the name with a dot before it."""


def module_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Each name as transformers 5 names the parameter once it is loaded."""
    rules = [(re.compile(old), new) for old, new in _RENAMES.get(config.model_type or "", ())]
    renamed = {}
    for name in names:
        value = f".{name}"
        for old, new in rules:
            value = old.sub(new, value)
        renamed[name] = value[1:]
    return renamed
