"""From the results of an extraction to the adapter: what is stored, and under which names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratool.adapter import Adapter, ModuleKind, Replacement, Update, module_of
from loratool.formats import peft
from loratool.layouts.pairs import Alignment, Pair
from loratool.layouts.ties import Tie
from loratool.ops.extract_jobs import ExtractResult
from loratool.ops.extract_report import Status


def build_adapter(
    alignment: Alignment,
    results: Sequence[ExtractResult],
    *,
    task_type: str | None,
    base_model: str | None,
) -> Adapter:
    """The adapter that holds every stored change, complete in the way PEFT's loader expects."""
    pairs = {pair.name: pair for pair in alignment.pairs}
    updates: dict[str, Update] = {}
    for result in results:
        if result.update is not None:
            updates[result.row.name] = result.update
        elif result.row.status is Status.WHOLE:
            updates[result.row.name] = Replacement(pairs[result.row.name].tuned)
    _complete_ties(alignment.ties, updates, pairs)
    for name in list(updates):
        _complete_module(name, updates, pairs)
    _complete_ties(alignment.ties, updates, pairs)
    task = _complete_task_head(task_type, updates, pairs)
    return Adapter(
        updates,
        peft.NAME,
        base_model=base_model,
        fan_in_fan_out=any(
            pairs[name].kind is ModuleKind.CONV1D for name in updates if name in pairs
        ),
        task_type=task,
    )


def in_task_head(name: str, task_type: str | None) -> bool:
    """Whether a parameter belongs to the head that PEFT saves whole for this task."""
    return name.split(".")[0] in peft.TASK_HEADS.get(task_type or "", ())


def _complete_ties(
    ties: Sequence[Tie], updates: dict[str, Update], pairs: Mapping[str, Pair]
) -> None:
    """What changed under one name is stored under all: PEFT's modules do not share."""
    for tie in ties:
        if any(name in updates for name in tie.names):
            for name in tie.names:
                updates.setdefault(name, Replacement(pairs.get(name, pairs[tie.main]).tuned))


def _complete_module(name: str, updates: dict[str, Update], pairs: Mapping[str, Pair]) -> None:
    """A module stored whole is stored with its unchanged half too: PEFT copies whole modules."""
    partner = f"{module_of(name)}.bias"
    if name.endswith(".weight") and isinstance(updates[name], Replacement) and partner in pairs:
        updates.setdefault(partner, Replacement(pairs[partner].tuned))
    weight = pairs.get(f"{module_of(name)}.weight")
    if name.endswith(".bias") and weight is not None and weight.kind is ModuleKind.NORM:
        updates.setdefault(weight.name, Replacement(weight.tuned))


def _complete_task_head(
    task: str | None, updates: dict[str, Update], pairs: Mapping[str, Pair]
) -> str | None:
    """The task for PEFT's config. PEFT insists on finding a task's whole head in the file, so
    the head is completed where part of it changed, and the task not named where none did."""
    head = [pair for pair in pairs.values() if in_task_head(pair.name, task)]
    if head and not any(pair.name in updates for pair in head):
        return None
    for pair in head:
        updates.setdefault(pair.name, Replacement(pair.tuned))
    return task


def base_modules(alignment: Alignment) -> set[str]:
    """Every module of the base that owns a parameter, or holds one that does."""
    owners = {module_of(pair.name) for pair in alignment.pairs}
    owners |= {module_of(name) for tie in alignment.ties for name in tie.names}
    return {
        ".".join(parts[:length])
        for parts in (owner.split(".") for owner in owners)
        for length in range(1, len(parts) + 1)
    } - {""}


def stored_size(adapter: Adapter) -> tuple[int, int]:
    """(values, bytes) of an adapter's tensors."""
    sizes = [(math.prod(tensor.shape), tensor.dtype.bits // 8) for tensor in adapter.tensors]
    return sum(count for count, _ in sizes), sum(count * item for count, item in sizes)
