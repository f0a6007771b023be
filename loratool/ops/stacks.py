"""Parameters that hold several matrices: their updates are stored together or not at all.

PEFT keeps the factors of all experts in one pair, with one rank and one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from loratool.adapter import LowRankUpdate
from loratool.formats.peft_experts import parameter_of
from loratool.profiles.padding import padded
from loratool.storage.dtypes import DType
from loratool.storage.tensors import MemoryTensor


def is_indexed(name: str) -> bool:
    """Whether a name is of one of several matrices in a parameter."""
    return parameter_of(name) != name


def completed(
    updates: Mapping[str, LowRankUpdate], wanted: Iterable[str], key: str
) -> dict[str, LowRankUpdate]:
    """The updates, those of one parameter's matrices padded to one rank and none of them missing.

    wanted: the names of all matrices; one of a parameter that has updates, but none here, gets an
    update of zero. ``key`` determines the padding.
    """
    stacks: dict[str, list[str]] = {}
    for name in wanted:
        if is_indexed(name):
            stacks.setdefault(parameter_of(name), []).append(name)
    result = dict(updates)
    for names in stacks.values():
        present = [updates[name] for name in names if name in updates]
        if not present:
            continue
        rank = max(update.rank for update in present)
        first = present[0]
        for name in names:
            update = updates.get(name) or nothing_like(
                first, first.b.dtype, first.scale, f"{key}:{name}"
            )
            result[name] = padded(update, rank, f"{key}:{name}")
    return result


def at_one_rank(updates: Mapping[str, LowRankUpdate], key: str) -> dict[str, LowRankUpdate]:
    """The updates, all padded to the largest rank among them. ``key`` determines the padding."""
    top = max(update.rank for update in updates.values())
    return {name: padded(update, top, f"{key}:{name}") for name, update in updates.items()}


def nothing_like(update: LowRankUpdate, dtype: DType, scale: float, key: str) -> LowRankUpdate:
    """An update of zero, of rank 1, with the shape of another. ``key``: of the row of A, which is
    not zero, so that it can be trained."""
    b = torch.zeros(update.b.shape[0], 0, *update.b.shape[2:], dtype=dtype.torch)
    a = torch.zeros(0, *update.a.shape[1:], dtype=dtype.torch)
    empty = LowRankUpdate(MemoryTensor(b), MemoryTensor(a), scale, 0, update.is_embedding)
    return padded(empty, 1, key)
