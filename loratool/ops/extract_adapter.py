"""From the results of an extraction to the adapter: what is stored, and under which names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from loratool.adapter import Adapter, ModuleKind, Replacement, TokenRows, Update, module_of
from loratool.formats import peft
from loratool.formats.peft_experts import parameter_of
from loratool.layouts.pairs import Alignment, Pair
from loratool.layouts.ties import Tie
from loratool.ops.extract_experts import complete_experts
from loratool.ops.extract_jobs import ExtractResult
from loratool.ops.extract_report import Status
from loratool.storage.views import rows_of


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
        elif result.row.status is Status.NEW_ROWS:
            updates[result.row.name] = _new_rows(pairs[result.row.name])
        elif result.row.status is Status.WHOLE:
            updates[result.row.name] = Replacement(pairs[result.row.name].whole)
    _complete_ties(alignment.ties, updates, pairs)
    _complete_modules(updates, pairs)
    _complete_ties(alignment.ties, updates, pairs)
    complete_experts(updates, pairs)
    task = _complete_task_head(task_type, updates, pairs)
    return Adapter(
        updates,
        peft.NAME,
        base_model=base_model,
        fan_in_fan_out=any(
            pairs[name].kind is ModuleKind.CONV1D for name in updates if name in pairs
        ),
        task_type=task,
        as_parameters=frozenset(filter(alignment.experts.is_retargeted, updates)),
    )


def _new_rows(pair: Pair) -> TokenRows:
    """The tokens that the tuned table has beyond the base's."""
    first, last = pair.tuned.rows, pair.whole.rows
    return TokenRows(tuple(range(first, last)), rows_of(pair.whole, first, last))


def in_task_head(name: str, task_type: str | None) -> bool:
    """Whether a parameter belongs to what PEFT saves whole for this task: it takes a name's end for
    the name (pre_classifier for classifier)."""
    return is_saved_with(name, peft.TASK_HEADS.get(task_type or "", ()))


def is_saved_with(name: str, saved: Collection[str]) -> bool:
    """Whether PEFT saves a parameter when its config lists these modules: those inside them, and
    inside modules whose names end like theirs (post_norm where a model has a norm of its own)."""
    ends = tuple(saved)
    return any(owner.endswith(ends) for owner in _owners(name))


def _complete_ties(
    ties: Sequence[Tie], updates: dict[str, Update], pairs: Mapping[str, Pair]
) -> None:
    """What changed under one name is stored under all: PEFT's modules do not share."""
    for tie in ties:
        if any(isinstance(updates.get(name), TokenRows) for name in tie.names):
            continue  # PEFT shares the tokens of a tied pair by itself
        if any(name in updates for name in tie.names):
            for name in tie.names:
                updates.setdefault(name, Replacement(pairs.get(name, pairs[tie.main]).whole))


def _complete_modules(updates: dict[str, Update], pairs: Mapping[str, Pair]) -> None:
    """A module stored whole is stored with its unchanged parts too, as PEFT copies modules whole,
    and with its namesakes."""
    saved = {
        module_of(name)
        for name, update in updates.items()
        if isinstance(update, Replacement) and not _is_bias_alone(name, pairs)
    }
    for name, pair in pairs.items():
        if is_saved_with(name, saved):
            updates.setdefault(name, Replacement(pair.whole))


def _is_bias_alone(name: str, pairs: Mapping[str, Pair]) -> bool:
    """Whether PEFT stores this parameter as a bias, and not with its module."""
    weight = pairs.get(f"{module_of(name)}.weight")
    return name.endswith(".bias") and (weight is None or weight.kind is not ModuleKind.NORM)


def _owners(name: str) -> Iterator[str]:
    """The modules that a parameter lies in, the nearest first."""
    while name := module_of(name):
        yield name


def _complete_task_head(
    task: str | None, updates: dict[str, Update], pairs: Mapping[str, Pair]
) -> str | None:
    """The task for PEFT's config. PEFT insists on finding a task's whole head in the file, so
    the head is completed where part of it changed, and the task not named where none did."""
    head = [pair for pair in pairs.values() if in_task_head(pair.name, task)]
    if head and not any(pair.name in updates for pair in head):
        return None
    for pair in head:
        updates.setdefault(pair.name, Replacement(pair.whole))
    return task


def base_modules(alignment: Alignment) -> set[str]:
    """Every module of the base that owns a parameter, or holds one that does."""
    owners = {module_of(parameter_of(pair.name)) for pair in alignment.pairs}
    owners |= {module_of(name) for tie in alignment.ties for name in tie.names}
    return owners.union(*map(_owners, owners)) - {""}


def stored_size(adapter: Adapter) -> tuple[int, int]:
    """(values, bytes) of an adapter's tensors."""
    sizes = [(math.prod(tensor.shape), tensor.dtype.bits // 8) for tensor in adapter.tensors]
    return sum(count for count, _ in sizes), sum(count * item for count, item in sizes)
