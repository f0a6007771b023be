"""Which checkpoint tensor each update of an adapter changes, and in which orientation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    ModuleKind,
    Replacement,
    TokenRows,
    Update,
    module_of,
)
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
    module the row of the update's that it takes, or −1. member: which matrix of a stack of them
    (experts fused into one tensor).
    """

    source: str
    target: str
    update: Update
    transposed: bool = False
    weight: float = 1.0
    adapter: int = 0
    places: tuple[int, ...] | None = None
    member: int | None = None

    def describe(self) -> str:
        text = self.update.describe(self.weight)
        if self.places is not None:
            rows = sum(place >= 0 for place in self.places)
            text += f" on {rows} of {len(self.places)} rows"
        if self.member is not None:
            text += f" of matrix {self.member}"
        return text + (", transposed" if self.transposed else "")


def describe(updates: Sequence[PlacedUpdate]) -> str:
    """What is done to one tensor, in a few words."""
    members = {update.member for update in updates} - {None}
    if len(members) > 1:
        return f"{updates[0].update.describe(updates[0].weight)} on {len(members)} matrices"
    return " + ".join(update.describe() for update in updates)


@dataclass(frozen=True)
class Placement:
    """All updates by checkpoint tensor, in the order of their adapters.

    notes: guesses made. added: updates of biases that the base does not have, by the name that
    they would be stored under; they start from zero.
    """

    updates: dict[str, tuple[PlacedUpdate, ...]]
    base_copies: dict[str, tuple[LazyTensor, ...]]
    notes: tuple[str, ...]
    added: dict[str, tuple[PlacedUpdate, ...]] = field(default_factory=dict)


def place(
    adapters: Sequence[tuple[Adapter, float]],
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    *,
    add_bias: bool = False,
) -> Placement:
    """Find the tensor of every update of the adapters, each of which has a weight.

    Updates of different adapters on one tensor are summed. add_bias: whether a trained bias may
    be for a module that has none in the base. Raises NothingMatches naming updates
    without a tensor and what looks like them, ShapeMismatch, and DisagreementError for an adapter
    that changes one side of a tied pair or two that cannot be summed; UsageError for a weight on
    replaced values.
    """
    updates: dict[str, tuple[PlacedUpdate, ...]] = {}
    copies: dict[str, tuple[LazyTensor, ...]] = {}
    added: dict[str, tuple[PlacedUpdate, ...]] = {}
    notes: list[str] = []
    for index, (adapter, weight) in enumerate(adapters):
        one = _place_one(adapter, tensors, config, add_bias)
        for name, placed in one.added.items():
            ours = tuple(replace(update, weight=weight, adapter=index) for update in placed)
            added[name] = added.get(name, ()) + ours
        for name, placed in one.updates.items():
            ours = tuple(replace(update, weight=weight, adapter=index) for update in placed)
            updates[name] = updates.get(name, ()) + ours
        for name, copied in one.base_copies.items():
            copies[name] = copies.get(name, ()) + copied
        notes += [note for note in one.notes if note not in notes]
    for name, placed in updates.items():
        _check_summable(name, placed)
    return Placement(updates, copies, tuple(notes), added)


def _check_summable(name: str, placed: Sequence[PlacedUpdate]) -> None:
    replacing = [update for update in placed if isinstance(update.update, Replacement | TokenRows)]
    if replacing and len(placed) > 1:
        raise DisagreementError(
            f"{name}: one adapter replaces values of it and another changes it as well",
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
    adapter: Adapter, tensors: Mapping[str, TensorInfo], config: ModelConfig, add_bias: bool
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
    found = {name: matched.found[asked[name]] for name in adapter.updates if name not in missing}
    new_biases = _new_biases(adapter, missing, found, stored_as)
    if new_biases and not add_bias:
        raise DisagreementError(
            f"the adapter trained biases (lora_bias) for {len(new_biases)} modules that have none "
            f"in the base: {next(iter(new_biases.values())).target}",
            hint="leave them out with --exclude '*.bias' if they can be done without",
        )
    missing = [name for name in missing if name not in new_biases]
    if missing:
        raise _nothing_matches(missing, len(adapter.updates), tensors)
    notes = [f"{matched.note} of the adapter in the base"] if matched.note else []
    by_target: dict[str, tuple[str, Update]] = {}
    for source, target in found.items():
        update = adapter.updates[source]
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
    added: dict[str, tuple[PlacedUpdate, ...]] = {
        update.target: (update,) for update in new_biases.values()
    }
    return Placement(placed, copies, tuple(notes), added)


def _new_biases(
    adapter: Adapter,
    missing: Sequence[str],
    found: Mapping[str, str],
    stored_as: Mapping[str, str],
) -> dict[str, PlacedUpdate]:
    """Differences of biases beside a weight that the base has, by the adapter's name."""
    biases = {}
    for name in missing:
        weight = f"{module_of(name)}.weight"
        update = adapter.updates[name]
        if name.endswith(".bias") and isinstance(update, DenseUpdate) and weight in found:
            stored = stored_as.get(found[weight], found[weight])
            biases[name] = PlacedUpdate(name, f"{module_of(stored)}.bias", update)
    return biases


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


def _oriented(
    source: str, target: str, update: Update, stored: tuple[int, ...], kind: ModuleKind
) -> PlacedUpdate:
    if isinstance(update, TokenRows):
        return _rows_of_table(source, target, update, stored)
    core = update.low_rank if isinstance(update, DoraUpdate) else update
    is_product = isinstance(core, LowRankUpdate | HadamardUpdate | KroneckerUpdate)
    of_table = isinstance(core, LowRankUpdate) and core.is_embedding
    shape: tuple[int, ...] = update.shape
    if is_product and kind is ModuleKind.CONV1D and not of_table:
        if shape == stored[::-1]:
            return PlacedUpdate(source, target, update, transposed=True)
        raise _wrong_shape(source, target, shape, stored, " as (in, out)")
    if isinstance(core, LowRankUpdate) and core.kernel:
        shape = (shape[0], *core.kernel)
        if shape != stored and (stored[:1], stored[2:]) == (shape[:1], shape[2:]):
            raise UnsupportedInput(
                f"{target}: is a grouped convolution {list(stored)}, the update is for {shape[1]} "
                "input channels; PEFT itself does not merge those",
                hint=f"leave it out with --exclude {source}",
            )
    elif isinstance(core, HadamardUpdate | KroneckerUpdate):  # of convolutions as well
        stored = (stored[0], math.prod(stored[1:])) if len(stored) > 2 else stored
    if shape != stored:
        raise _wrong_shape(source, target, shape, stored, "")
    return PlacedUpdate(source, target, update)


def _rows_of_table(
    source: str, target: str, update: TokenRows, stored: tuple[int, ...]
) -> PlacedUpdate:
    if len(stored) != 2 or update.shape[1:] != stored[1:]:
        raise _wrong_shape(source, target, update.shape, stored, "")
    if max(update.indices, default=0) >= stored[0]:
        raise ShapeMismatch(
            f"{target}: the adapter trained token {max(update.indices)}, the base has {stored[0]}",
            hint="add the tokens to the base first, as for the training",
        )
    return PlacedUpdate(source, target, update)


def _wrong_shape(
    source: str, target: str, shape: tuple[int, ...], stored: tuple[int, ...], how: str
) -> ShapeMismatch:
    return ShapeMismatch(
        f"{target}: the update has shape {list(shape)}, the base stores {list(stored)}{how}",
        details=[f"in the adapter: {source}"] if source != target else [],
        hint="another size of the same model, a resized vocabulary, or another number of labels",
    )
