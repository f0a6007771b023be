"""Updates of parameters that go by several names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from loratool.adapter import DoraUpdate, KasaUpdate, TokenRows, Update
from loratool.errors import DisagreementError, UnsupportedInput, UsageError
from loratool.layouts.config import ModelConfig
from loratool.layouts.ties import Tie, output_head, same_values
from loratool.storage.tensors import TensorInfo


def without_head(
    ties: Sequence[Tie], names: Collection[str], config: ModelConfig
) -> tuple[tuple[Tie, ...], Tie]:
    """The ties without the output head, and the tie of the head and what it was tied to.

    Raises UsageError where no head is tied, UnsupportedInput where it cannot be stored apart.
    """
    head = output_head(names, config)
    tie = next((tie for tie in ties if head in tie.names), None)
    if head is None or tie is None:
        raise UsageError("the base ties no output head to its embedding; nothing is to be untied")
    if tie.main == head:
        raise UnsupportedInput(f"{head}: is stored alone, without the embedding it is tied to")
    if head not in tie.stored and tie.main.count(".") == 1 and tie.main != "shared.weight":
        raise UnsupportedInput(
            f"{tie.main}: is stored without the prefix of the model that has {head}, so that "
            "cannot be added beside it",
            hint="save the base from its head model (…ForCausalLM) first",
        )
    rest = Tie(tuple(name for name in tie.names if name != head), tie.stored - {head})
    return tuple(rest if one is tie else one for one in ties), Tie((tie.main, head), tie.stored)


def settle_tie(
    tie: Tie,
    by_target: dict[str, tuple[str, Update]],
    infos: Mapping[str, TensorInfo],
    *,
    share: bool = False,
) -> list[str]:
    """A change of a tied parameter must name all its names equally; it is then applied once.

    Names that the base stores with other values are not tied, whatever its config says. share:
    whether an update of some of the names is meant for all of them.
    """
    share_token_rows(tie, by_target)
    shared = _share_update(tie, by_target) if share else []
    conflict = _conflict(tie, by_target)
    if conflict is not None:
        also = tie.stored - {tie.main}
        apart = {name for name in also if not same_values(infos[tie.main], infos[name])}
        tie = Tie(tuple(n for n in tie.names if n not in apart), tie.stored - apart)
        conflict = _conflict(tie, by_target)
        if conflict is not None:
            raise conflict
    if tie.main not in by_target or len(tie.names) < 2:
        return []
    for name in tie.names:
        if name not in tie.stored:
            del by_target[name]
    names = " and ".join(tie.names)
    if len(tie.stored) > 1:
        return [*shared, f"{names} are tied: every stored one gets the same update"]
    return [*shared, f"{names} are tied and stored once: updated once"]


def _share_update(tie: Tie, by_target: dict[str, tuple[str, Update]]) -> list[str]:
    """Give the update of one name to the names that have none."""
    changed = [name for name in tie.names if name in by_target]
    others = [name for name in tie.names if name not in by_target]
    if not changed or not others:
        return []
    for name in others:
        by_target[name] = by_target[changed[0]]
    return [f"the adapter changes {changed[0]} alone; {' and '.join(others)} changes with it"]


def share_token_rows(tie: Tie, by_target: dict[str, tuple[str, Update]]) -> None:
    """PEFT trains the tokens of a tied pair once and saves them under one of its names."""
    tokens = [by_target[name] for name in tie.names if name in by_target]
    if len(tokens) == 1 and isinstance(tokens[0][1], TokenRows):
        for name in tie.names:
            by_target.setdefault(name, tokens[0])


def _conflict(tie: Tie, by_target: Mapping[str, tuple[str, Update]]) -> DisagreementError | None:
    changed = [name for name in tie.names if name in by_target]
    others = [name for name in tie.names if name not in by_target]
    if changed and others:
        return DisagreementError(
            f"the adapter changes {' and '.join(changed)} alone, but the base ties it to "
            f"{' and '.join(others)}",
            hint="merged, the change would act on both: merge --tied lets it, merge --untie "
            f"stores both apart, merge --exclude {changed[0]} leaves it out",
        )
    for name in changed[1:]:
        if not _same_update(by_target[tie.main][1], by_target[name][1]):
            return DisagreementError(
                f"the adapter changes {tie.main} and {name} differently, but the base ties them "
                "into one",
                hint="merge --untie stores both apart",
            )
    return None


def _same_update(first: Update, second: Update) -> bool:
    """Whether both do the same, to the last bit."""
    if type(first) is not type(second) or first.shape != second.shape:
        return False
    if _constants(first) != _constants(second) or len(first.tensors) != len(second.tensors):
        return False
    return all(
        one.shape == two.shape and torch.equal(one.read().double(), two.read().double())
        for one, two in zip(first.tensors, second.tensors, strict=True)
    )


def _constants(update: Update) -> tuple[object, ...]:
    core = update.low_rank if isinstance(update, DoraUpdate | KasaUpdate) else update
    return (getattr(core, "scale", None), getattr(update, "indices", None))
