"""Experts of one parameter brought to the one rank that PEFT gives all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loratool.adapter import LowRankUpdate, ModuleKind, Update
from loratool.formats.peft_experts import parameter_of
from loratool.layouts.pairs import Pair
from loratool.profiles.padding import padded
from loratool.storage.tensors import MemoryTensor


def complete_experts(updates: dict[str, Update], pairs: Mapping[str, Pair]) -> None:
    """Pad the updates of a parameter's matrices to the largest rank among them, and give those
    that did not change one of that rank with B zero."""
    stacks: dict[str, list[Pair]] = {}
    for name, pair in pairs.items():
        if pair.kind is ModuleKind.EXPERT:
            stacks.setdefault(parameter_of(name), []).append(pair)
    for stack in stacks.values():
        present = [updates[pair.name] for pair in stack if pair.name in updates]
        low_rank = [update for update in present if isinstance(update, LowRankUpdate)]
        if not low_rank:
            continue
        rank, like = max(update.rank for update in low_rank), low_rank[0]
        for pair in stack:
            update = updates.get(pair.name) or _nothing(like)
            if isinstance(update, LowRankUpdate):
                updates[pair.name] = padded(update, rank, pair.name)


def _nothing(like: LowRankUpdate) -> LowRankUpdate:
    """An update of rank 0, to be padded."""
    (out, into), dtype = like.shape, like.a.dtype.torch
    return replace(
        like,
        b=MemoryTensor(torch.empty(out, 0, dtype=dtype)),
        a=MemoryTensor(torch.empty(0, into, dtype=dtype)),
        alpha=0.0,
    )
