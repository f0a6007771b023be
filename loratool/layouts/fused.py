"""Matrices that one layout keeps in one tensor and another in several: q|k|v and gate|up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.layouts.config import ModelConfig
from loratool.storage.views import Columns, Joined, Stored, rows_of

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
_STACKED_PARTS = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
"""Fused layers whose parts lie one above the other."""


@dataclass(frozen=True)
class Refitted:
    """A checkpoint's tensors under the names of another's. note: what was done, or None."""

    tensors: dict[str, Stored]
    note: str | None


def refit(tensors: Mapping[str, Stored], like: Mapping[str, Stored]) -> Refitted:
    """Fuse or split the layers of ``tensors`` that ``like`` has in the other form.

    Only where sizes agree; what does not fit is left to the comparison of names and shapes.
    """
    result = dict(tensors)
    fused, split = [], []
    for name in like:
        whole, parts = _whole_and_parts(name)
        if whole in like and whole not in result and parts and set(parts) <= set(result):
            result[whole] = Joined(tuple(result.pop(part) for part in parts))
            fused.append(whole)
        elif parts and whole in result and whole not in like and set(parts) <= set(like):
            sizes = [like[part].shape[0] for part in parts]
            if sum(sizes) == result[whole].shape[0]:
                result |= dict(zip(parts, _stacked(result.pop(whole), sizes), strict=True))
                split.append(whole)
    notes = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {how}"
        for names, how in ((fused, "joined from its parts"), (split, "split into its parts"))
        if names
    ]
    return Refitted(result, "; ".join(notes) or None)


def split_fused(name: str, tensor: Stored, config: ModelConfig) -> dict[str, Stored] | None:
    """The parts of a fused layer's weight or bias, by the names that servers give them.

    {} for what is not fused; None for a fused layer whose arrangement is not known.
    """
    module, _, part = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    arrange = _ARRANGEMENTS.get(last)
    if arrange is None or part not in ("weight", "bias") or len(tensor.shape) > 2:
        return {}
    parts = arrange(tensor, config)
    if parts is None:
        return None
    stem = f"{parent}." if parent else ""
    return {f"{stem}{key}.{part}": value for key, value in parts.items()}


def _whole_and_parts(name: str) -> tuple[str, tuple[str, ...]]:
    """The fused name that ``name`` is, or is a part of, and the names of all parts."""
    module, _, part = name.rpartition(".")
    parent, dot, last = module.rpartition(".")
    for whole, parts in _STACKED_PARTS.items():
        if last == whole or last in parts:
            return (
                f"{parent}{dot}{whole}.{part}",
                tuple(f"{parent}{dot}{each}.{part}" for each in parts),
            )
    return name, ()


def _stacked(tensor: Stored, sizes: list[int]) -> list[Stored]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [rows_of(tensor, end - size, end) for end, size in zip(ends, sizes, strict=True)]


Parts = dict[str, Stored] | None


def _heads(config: ModelConfig, *names: str) -> int | None:
    values = (config.values.get(name) for name in names)
    return next(
        (v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None
    )


def _qkv_stacked(tensor: Stored, config: ModelConfig) -> Parts:
    """q over k over v, the latter two of as many heads as the config says."""
    heads = _heads(config, "num_attention_heads", "n_head")
    shared = _heads(config, "num_key_value_heads") or heads
    if not heads or not shared:
        return None
    width, rest = divmod(tensor.shape[0], heads + 2 * shared)
    if rest:
        return None
    sizes = [heads * width, shared * width, shared * width]
    return dict(zip(QKV, _stacked(tensor, sizes), strict=True))


def _halves(tensor: Stored, config: ModelConfig) -> Parts:
    half, rest = divmod(tensor.shape[0], 2)
    return None if rest else dict(zip(GATE_UP, _stacked(tensor, [half, half]), strict=True))


def _conv1d(tensor: Stored, config: ModelConfig) -> Parts:
    """GPT-2: q|k|v side by side in the columns of an (in, out) matrix."""
    if not config.uses_conv1d:
        return None
    third, rest = divmod(tensor.shape[-1], 3)
    if rest:
        return None
    if len(tensor.shape) == 1:
        return dict(zip(QKV, _stacked(tensor, [third] * 3), strict=True))
    return {name: Columns(tensor, i * third, (i + 1) * third) for i, name in enumerate(QKV)}


def _by_head(tensor: Stored, config: ModelConfig) -> Parts:
    """GPT-NeoX, BLOOM, Falcon: groups of heads one after the other, in each q, then k, then v."""
    heads = _heads(config, "num_attention_heads", "n_head")
    if not heads or config.model_type not in ("gpt_neox", "bloom", "falcon"):
        return None
    groups = heads
    if config.model_type == "falcon" and config.values.get("new_decoder_architecture"):
        groups = _heads(config, "num_kv_heads") or heads
    elif config.model_type == "falcon" and config.values.get("multi_query", True):
        groups = 1
    queries, odd = divmod(heads, groups)
    width, rest = divmod(tensor.shape[0], groups * (queries + 2))
    if odd or rest:
        return None
    step = (queries + 2) * width
    spans = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}
    return {
        name: Joined(
            tuple(
                rows_of(tensor, g * step + first * width, g * step + (first + count) * width)
                for g in range(groups)
            )
        )
        for name, (first, count) in spans.items()
    }


_ARRANGEMENTS = {
    "qkv_proj": _qkv_stacked,
    "gate_up_proj": _halves,
    "c_attn": _conv1d,
    "query_key_value": _by_head,
}
