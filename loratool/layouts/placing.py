"""Which checkpoint tensor each update of an adapter changes, and in which orientation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind, Replacement, Update
from loratool.errors import DisagreementError, NothingMatches, ShapeMismatch
from loratool.layouts.config import ModelConfig
from loratool.layouts.kinds import classify
from loratool.layouts.names import match_names, near_misses
from loratool.layouts.ties import TiedPair, find_tie
from loratool.storage.tensors import LazyTensor, TensorInfo


@dataclass(frozen=True)
class PlacedUpdate:
    """An update that knows its tensor.

    source: the adapter's name for the parameter. target: the checkpoint's. transposed: the
    tensor is stored (in, out). weight: what the user multiplies the update with.
    """

    source: str
    target: str
    update: Update
    transposed: bool = False
    weight: float = 1.0

    def describe(self) -> str:
        if isinstance(self.update, Replacement):
            return "replaced"
        turned = ", transposed" if self.transposed else ""
        return f"rank {self.update.rank}, scale {self.update.scale * self.weight:g}{turned}"


@dataclass(frozen=True)
class Placement:
    """All updates of an adapter by checkpoint tensor. notes: guesses made."""

    updates: dict[str, PlacedUpdate]
    base_copies: dict[str, LazyTensor]
    notes: tuple[str, ...]


def place(adapter: Adapter, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Placement:
    """Find every update's tensor.

    Raises NothingMatches naming updates without one and what looks like them, ShapeMismatch,
    and DisagreementError for an adapter that changes one side of a tied pair.
    """
    if not adapter.updates:
        raise NothingMatches("the adapter holds no update", hint="was everything excluded?")
    shapes = {name: info.shape for name, info in tensors.items()}
    kinds = classify(shapes, config, adapter_says_conv1d=adapter.fan_in_fan_out)
    tie = find_tie(list(tensors), kinds, config)
    targets = set(tensors) | ({tie.head} if tie else set())
    matched = match_names([*adapter.updates, *adapter.base_copies], targets)
    missing = [name for name in matched.missing if name in adapter.updates]
    if missing:
        raise _nothing_matches(missing, len(adapter.updates), tensors)
    notes = [f"{matched.note} of the adapter in the base"] if matched.note else []
    by_target: dict[str, tuple[str, Update]] = {}
    for source, update in adapter.updates.items():
        target = matched.found[source]
        if target in by_target:
            raise DisagreementError(f"{target}: two updates of the adapter claim it")
        by_target[target] = (source, update)
    if tie is not None:
        notes += _settle_tie(tie, by_target)
    placed = {}
    for target, (source, update) in by_target.items():
        placed[target] = _oriented(source, target, update, tensors[target].shape, kinds[target])
    copies = {
        matched.found[name]: copy
        for name, copy in adapter.base_copies.items()
        if matched.found.get(name) in tensors
    }
    return Placement(placed, copies, tuple(notes))


def _nothing_matches(
    missing: list[str], total: int, tensors: Mapping[str, TensorInfo]
) -> NothingMatches:
    details = []
    for name in missing[:8]:
        alike = near_misses(name, tensors)
        details.append(f"{name}   closest: {alike[0]}" if alike else name)
    if len(missing) > len(details):
        details.append(f"… {len(missing) - len(details)} more")
    return NothingMatches(
        f"{len(missing)} of the adapter's {total} updates match no tensor of the base",
        details=details,
        hint="is this the base that the adapter was made for? --exclude leaves updates out",
    )


def _settle_tie(tie: TiedPair, by_target: dict[str, tuple[str, Update]]) -> list[str]:
    """A change of a tied matrix must name both sides equally; it is then applied once."""
    sides = [name for name in (tie.embedding, tie.head) if name in by_target]
    if not sides:
        return []
    if len(sides) == 1:
        other = tie.head if sides[0] == tie.embedding else tie.embedding
        raise DisagreementError(
            f"the adapter changes {sides[0]} alone, but the base ties it to {other}",
            hint="merged, the change would act on both; a base with tie_word_embeddings: false "
            f"that stores both can take it, or leave it out with --exclude {sides[0]}",
        )
    if not _same_update(by_target[tie.embedding][1], by_target[tie.head][1]):
        raise DisagreementError(
            f"the adapter changes {tie.embedding} and {tie.head} differently, but the base ties "
            "them into one matrix",
            hint="a base with tie_word_embeddings: false that stores both can take it",
        )
    if tie.head_stored:
        return [f"{tie.embedding} and {tie.head} are tied: both get the same update"]
    del by_target[tie.head]
    return [f"{tie.embedding} and {tie.head} are tied and stored once: updated once"]


def _same_update(first: Update, second: Update) -> bool:
    if isinstance(first, Replacement) and isinstance(second, Replacement):
        return first.shape == second.shape and torch.equal(first.value.read(), second.value.read())
    if isinstance(first, LowRankUpdate) and isinstance(second, LowRankUpdate):
        if first.shape != second.shape or first.rank != second.rank:
            return False
        one, two = first.load(), second.load()
        return (
            one.scale == two.scale
            and torch.equal(one.b.double(), two.b.double())
            and torch.equal(one.a.double(), two.a.double())
        )
    return False


def _oriented(
    source: str, target: str, update: Update, stored: tuple[int, ...], kind: ModuleKind
) -> PlacedUpdate:
    if isinstance(update, LowRankUpdate) and kind is ModuleKind.CONV1D and not update.is_embedding:
        if update.shape == stored[::-1]:
            return PlacedUpdate(source, target, update, transposed=True)
        raise _wrong_shape(source, target, update.shape, stored, " as (in, out)")
    if update.shape != stored:
        raise _wrong_shape(source, target, update.shape, stored, "")
    return PlacedUpdate(source, target, update)


def _wrong_shape(
    source: str, target: str, shape: tuple[int, ...], stored: tuple[int, ...], how: str
) -> ShapeMismatch:
    return ShapeMismatch(
        f"{target}: the update has shape {list(shape)}, the base stores {list(stored)}{how}",
        details=[f"in the adapter: {source}"] if source != target else [],
        hint="another size of the same model, a resized vocabulary, or another number of labels",
    )
