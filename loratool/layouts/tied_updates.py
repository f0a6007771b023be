"""Updates of parameters that go by several names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratool.adapter import DoraUpdate, TokenRows, Update
from loratool.errors import DisagreementError
from loratool.layouts.ties import Tie, same_values
from loratool.storage.tensors import TensorInfo


def settle_tie(
    tie: Tie, by_target: dict[str, tuple[str, Update]], infos: Mapping[str, TensorInfo]
) -> list[str]:
    """A change of a tied parameter must name all its names equally; it is then applied once.

    Names that the base stores with other values are not tied, whatever its config says.
    """
    _share_token_rows(tie, by_target)
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
        return [f"{names} are tied: every stored one gets the same update"]
    return [f"{names} are tied and stored once: updated once"]


def _share_token_rows(tie: Tie, by_target: dict[str, tuple[str, Update]]) -> None:
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
            hint="merged, the change would act on both; a base with tie_word_embeddings: false "
            f"that stores both can take it, or leave it out with --exclude {changed[0]}",
        )
    for name in changed[1:]:
        if not _same_update(by_target[tie.main][1], by_target[name][1]):
            return DisagreementError(
                f"the adapter changes {tie.main} and {name} differently, but the base ties them "
                "into one",
                hint="a base with tie_word_embeddings: false that stores both can take it",
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
    core = update.low_rank if isinstance(update, DoraUpdate) else update
    return (getattr(core, "scale", None), getattr(update, "indices", None))
