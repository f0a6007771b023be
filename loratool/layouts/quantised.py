"""Whether a checkpoint is quantised, and how, from its config or the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loratool.layouts.config import ModelConfig

_MARKS = (
    (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    (".SCB", "bitsandbytes int8"),
    (".g_idx", "GPTQ"),
    (".qweight", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "float8 by blocks"),
    (".weight_scale", "scaled weights"),
    ("_blocks", "MXFP4"),
)
"""End of a tensor's name → the format, the most telling first."""


def quantisation(names: Collection[str], config: ModelConfig) -> str | None:
    """What config.json or the names say; None where neither tells of any."""
    said = config.values.get("quantization_config")
    if isinstance(said, Mapping):
        method = said.get("quant_method")
        return method if isinstance(method, str) else "by a method that config.json does not name"
    for mark, name in _MARKS:
        if any(each.endswith(mark) for each in names):
            return name
    return None
