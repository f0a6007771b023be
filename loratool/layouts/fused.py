"""Matrices that one layout keeps in one tensor and another in several: q|k|v and gate|up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratool.layouts.config import ModelConfig
from loratool.layouts.fusing import GATE_UP, QKV, Undecided, part_names, part_rows
from loratool.storage.views import Columns, Joined, Stored, rows_of

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


def split_fused(name: str, tensor: Stored, config: ModelConfig) -> dict[str, Stored] | Undecided:
    """The parts of a fused layer's weight or bias, by the names that servers give them.

    {} for what is not fused.
    """
    conv1d = bool(config.uses_conv1d)
    rows = part_rows(name, tensor.shape, config, conv1d=conv1d)
    if rows is None or isinstance(rows, Undecided):
        return rows or {}
    module, _, part = name.rpartition(".")
    parent, dot, last = module.rpartition(".")
    in_columns = conv1d and last == "c_attn" and len(tensor.shape) == 2
    return {
        f"{parent}{dot}{each}.{part}": _taken(tensor, taken, in_columns)
        for each, taken in zip(part_names(name)[0], rows, strict=True)
    }


def _taken(tensor: Stored, outputs: Sequence[int], in_columns: bool) -> Stored:
    """These outputs of a fused layer, run by run of consecutive ones."""
    breaks = [k for k in range(1, len(outputs)) if outputs[k] != outputs[k - 1] + 1]
    edges = zip([0, *breaks], [*breaks, len(outputs)], strict=True)
    runs = [(outputs[first], outputs[last - 1] + 1) for first, last in edges]
    if in_columns:
        ((start, stop),) = runs
        return Columns(tensor, start, stop)
    parts = tuple(rows_of(tensor, start, stop) for start, stop in runs)
    return parts[0] if len(parts) == 1 else Joined(parts)


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
