"""Weights that a model reads without calling their modules, where no update of PEFT's would act.

PEFT's updates live in the forward pass of a module's wrapper. Where the model's code takes
``self.out_proj.weight`` instead, on some device at least, an adapter is refused by PEFT (two names
of Mamba's) or loads and does nothing. A module that is saved whole is read rightly either way.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from loratool.adapter import module_of
from loratool.layouts.config import ModelConfig

_SCAN = r"(conv1d|dt_proj|out_proj|x_proj)"
_MASK_HEAD = r"bbox_attention\.(k_proj|k_linear)"
_RELATIVE = r"rel_pos_(x_|y_)?bias"
_ALTUP = r"altup\.(correction|prediction)_coefs"
_TDNN = r"tdnn\.\d+\.kernel"
_READ = {
    **dict.fromkeys(
        ("data2vec-audio", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer"),
        _TDNN,
    ),
    "bamba": r"(conv1d|out_proj)",
    "conditional_detr": _MASK_HEAD,
    "dab-detr": _MASK_HEAD,
    "detr": _MASK_HEAD,
    "falcon_h1": _SCAN,
    "falcon_mamba": _SCAN,
    "granitemoehybrid": r"(conv1d|out_proj)",
    "gemma3n": _ALTUP,
    "gemma3n_text": _ALTUP,
    "jamba": r"(conv1d|dt_proj)",
    "layoutlmv2": _RELATIVE,
    "layoutlmv3": _RELATIVE,
    "mamba": _SCAN,
    "mamba2": _SCAN,
    "mobilebert": r"predictions\.dense",
    "nemotron_h": _SCAN,
    "wavlm": rf"(attention\.(q_proj|k_proj|v_proj|out_proj)|{_TDNN})",
    "zamba2": r"(conv1d|out_proj)",
}
"""model_type → the ends of such modules' names. Read off transformers 5.24."""


def is_read_past_its_module(name: str, names: Collection[str], config: ModelConfig) -> bool:
    """Whether the weight ``name`` is read so. names: all of the model's parameters.

    torch's MultiheadAttention does it with its out_proj, whatever the model; it is told by the
    bare in_proj_weight beside it.
    """
    module = module_of(name)
    owner, _, last = module.rpartition(".")
    if last == "out_proj" and f"{owner}.in_proj_weight" in names:
        return True
    for part, inner in config.parts.items():
        if name.startswith(f"{part}."):
            return is_read_past_its_module(name.removeprefix(f"{part}."), (), inner)
    ends = _READ.get(config.model_type or "")
    return ends is not None and re.search(rf"(?:^|\.){ends}$", module) is not None
