"""Which checkpoint tensor each update of an adapter changes, and in which orientation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loratool.adapter import Adapter, LowRankUpdate, ModuleKind, Replacement, Update
from loratool.errors import (
    DisagreementError,
    NothingMatches,
    ShapeMismatch,
    UnsupportedInput,
    UsageError,
)
from loratool.layouts.config import ModelConfig
from loratool.layouts.kinds import classify
from loratool.layouts.names import match_names, near_misses
from loratool.layouts.renames import module_names
from loratool.layouts.ties import Tie, find_ties, same_values
from loratool.storage.tensors import LazyTensor, TensorInfo


@dataclass(frozen=True)
class PlacedUpdate:
    """An update that knows its tensor.

    source: the adapter's name for the parameter. target: the checkpoint's. transposed: the
    tensor is stored (in, out). weight: what the user multiplies the update with. adapter: which
    of the adapters it comes from, counted from 0. places: where an update meets only a part of the
    tensor, or only a part of it does (split and fused projections): for each row of the target's
    module the row of the update's that it takes, or −1.
    """

    source: str
    target: str
    update: Update
    transposed: bool = False
    weight: float = 1.0
    adapter: int = 0
    places: tuple[int, ...] | None = None

    def describe(self) -> str:
        text = self.update.describe(self.weight)
        if self.places is not None:
            rows = sum(place >= 0 for place in self.places)
            text += f" on {rows} of {len(self.places)} rows"
        return text + (", transposed" if self.transposed else "")


def describe(updates: Sequence[PlacedUpdate]) -> str:
    """What is done to one tensor, in a few words."""
    return " + ".join(update.describe() for update in updates)


@dataclass(frozen=True)
class Placement:
    """All updates by checkpoint tensor, in the order of their adapters. notes: guesses made."""

    updates: dict[str, tuple[PlacedUpdate, ...]]
    base_copies: dict[str, tuple[LazyTensor, ...]]
    notes: tuple[str, ...]


def place(
    adapters: Sequence[tuple[Adapter, float]],
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
) -> Placement:
    """Find the tensor of every update of the adapters, each of which has a weight.

    Updates of different adapters on one tensor are summed. Raises NothingMatches naming updates
    without a tensor and what looks like them, ShapeMismatch, and DisagreementError for an adapter
    that changes one side of a tied pair or two that cannot be summed; UsageError for a weight on
    replaced values.
    """
    updates: dict[str, tuple[PlacedUpdate, ...]] = {}
    copies: dict[str, tuple[LazyTensor, ...]] = {}
    notes: list[str] = []
    for index, (adapter, weight) in enumerate(adapters):
        one = _place_one(adapter, tensors, config)
        for name, placed in one.updates.items():
            ours = tuple(replace(update, weight=weight, adapter=index) for update in placed)
            updates[name] = updates.get(name, ()) + ours
        for name, copied in one.base_copies.items():
            copies[name] = copies.get(name, ()) + copied
        notes += [note for note in one.notes if note not in notes]
    for name, placed in updates.items():
        _check_summable(name, placed)
    return Placement(updates, copies, tuple(notes))


def _check_summable(name: str, placed: Sequence[PlacedUpdate]) -> None:
    replacing = [update for update in placed if isinstance(update.update, Replacement)]
    if replacing and len(placed) > 1:
        raise DisagreementError(
            f"{name}: one adapter replaces it whole and another changes it as well",
            details=[update.source for update in placed],
            hint=f"leave it out of one of them with --exclude {name}",
        )
    if replacing and replacing[0].weight != 1:
        raise UsageError(
            f"{name}: the adapter replaces it, which a weight of {replacing[0].weight:g} does not "
            "apply to",
            hint="leave replaced parameters out with --exclude, or use weight 1",
        )


def _place_one(
    adapter: Adapter, tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Placement:
    if not adapter.updates:
        raise NothingMatches("the adapter holds no update", hint="was everything excluded?")
    stored_as = {module: name for name, module in module_names(tensors, config).items()}
    shapes = {module: tensors[name].shape for module, name in stored_as.items()}
    kinds = classify(shapes, config, adapter_says_conv1d=adapter.fan_in_fan_out)
    ties = find_ties(list(shapes), kinds, config)
    targets = set(shapes).union(*(tie.names for tie in ties))
    asked = module_names([*adapter.updates, *adapter.base_copies], config)
    matched = match_names(asked.values(), targets)
    missing = [name for name in adapter.updates if asked[name] in matched.missing]
    if missing:
        raise _nothing_matches(missing, len(adapter.updates), tensors)
    notes = [f"{matched.note} of the adapter in the base"] if matched.note else []
    by_target: dict[str, tuple[str, Update]] = {}
    for source, update in adapter.updates.items():
        target = matched.found[asked[source]]
        if target in by_target:
            raise DisagreementError(f"{target}: two updates of the adapter claim it")
        by_target[target] = (source, update)
    for tie in ties:
        notes += _settle_tie(tie, by_target, {m: tensors[n] for m, n in stored_as.items()})
    placed: dict[str, tuple[PlacedUpdate, ...]] = {}
    for target, (source, update) in by_target.items():
        name = stored_as[target]
        placed[name] = (_oriented(source, name, update, shapes[target], kinds[target]),)
    copies: dict[str, tuple[LazyTensor, ...]] = {
        stored_as[matched.found[asked[name]]]: (copy,)
        for name, copy in adapter.base_copies.items()
        if matched.found.get(asked[name]) in stored_as
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


def _settle_tie(
    tie: Tie, by_target: dict[str, tuple[str, Update]], infos: Mapping[str, TensorInfo]
) -> list[str]:
    """A change of a tied parameter must name all its names equally; it is then applied once.

    Names that the base stores with other values are not tied, whatever its config says.
    """
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
    if isinstance(update, LowRankUpdate) and update.kernel:
        shape = (update.shape[0], *update.kernel)
        if shape != stored and (stored[:1], stored[2:]) == (shape[:1], shape[2:]):
            raise UnsupportedInput(
                f"{target}: is a grouped convolution {list(stored)}, the update is for {shape[1]} "
                "input channels; PEFT itself does not merge those",
                hint=f"leave it out with --exclude {source}",
            )
    else:
        shape = update.shape
    if shape != stored:
        raise _wrong_shape(source, target, shape, stored, "")
    return PlacedUpdate(source, target, update)


def _wrong_shape(
    source: str, target: str, shape: tuple[int, ...], stored: tuple[int, ...], how: str
) -> ShapeMismatch:
    return ShapeMismatch(
        f"{target}: the update has shape {list(shape)}, the base stores {list(stored)}{how}",
        details=[f"in the adapter: {source}"] if source != target else [],
        hint="another size of the same model, a resized vocabulary, or another number of labels",
    )
