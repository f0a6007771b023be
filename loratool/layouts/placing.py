"""Which checkpoint tensor each update of an adapter changes, and in which orientation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from loratool.adapter import (
    Adapter,
    DenseUpdate,
    KasaUpdate,
    ModuleKind,
    Replacement,
    TokenRows,
    Update,
    module_of,
)
from loratool.errors import (
    DisagreementError,
    LoratoolError,
    NothingMatches,
    ShapeMismatch,
    UsageError,
)
from loratool.layouts.config import ModelConfig
from loratool.layouts.fusing import Offer, offered_names
from loratool.layouts.kinds import classify, may_be_conv1d
from loratool.layouts.names import match_names, near_misses
from loratool.layouts.orienting import on_piece, oriented
from loratool.layouts.placed import PlacedUpdate, Placement, TieChoice, describe
from loratool.layouts.renames import module_names
from loratool.layouts.tied_updates import settle_tie, share_token_rows, without_head
from loratool.layouts.ties import find_ties
from loratool.layouts.vocabulary import grown_tables
from loratool.plural import counted
from loratool.storage.tensors import LazyTensor, TensorInfo

_LARGEST_WEIGHT = 1e100
"""Products of it with a scale and two stored values are doubles."""

__all__ = ["PlacedUpdate", "Placement", "TieChoice", "can_be_untied", "describe", "place"]


def place(
    adapters: Sequence[tuple[Adapter, float]],
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    *,
    add_bias: bool = False,
    ties: TieChoice = TieChoice.REFUSE,
    grow: bool = False,
) -> Placement:
    """Find the tensor of every update of the adapters, each of which has a weight.

    Updates of different adapters on one tensor are summed. add_bias: whether a trained bias may
    be for a module that has none in the base. ties: what becomes of a tie that an adapter changes
    on one side. grow: whether tables may get tokens that the base does not have. Raises
    NothingMatches naming updates
    without a tensor and what looks like them, ShapeMismatch, and DisagreementError for an adapter
    that changes one side of a tied pair or two that cannot be summed; UsageError for a weight on
    replaced values or beyond any use.
    """
    updates: dict[str, tuple[PlacedUpdate, ...]] = {}
    copies: dict[str, tuple[LazyTensor, ...]] = {}
    added: dict[str, tuple[PlacedUpdate, ...]] = {}
    untied: dict[str, str] = {}
    grown: dict[str, int] = {}
    notes: list[str] = []
    for index, (adapter, weight) in enumerate(adapters):
        if not abs(weight) <= _LARGEST_WEIGHT:
            raise UsageError(
                f"adapter {index + 1} has the weight {weight:g}, --scale included",
                hint=f"weights go up to {_LARGEST_WEIGHT:g}",
            )
        one = _place_one(adapter, tensors, config, add_bias, ties, grow)
        grown |= one.grown
        untied |= one.untied
        for name, placed in one.added.items():
            ours = tuple(replace(update, weight=weight, adapter=index) for update in placed)
            added[name] = added.get(name, ()) + ours
        for name, placed in one.updates.items():
            ours = tuple(replace(update, weight=weight, adapter=index) for update in placed)
            updates[name] = updates.get(name, ()) + ours
        for name, copied in one.base_copies.items():
            copies[name] = copies.get(name, ()) + copied
        notes += one.notes
    for name, placed in updates.items():
        _check_summable(name, placed)
    return Placement(updates, copies, tuple(dict.fromkeys(notes)), added, untied, grown)


def can_be_untied(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> bool:
    """Whether a head is tied to its embedding here, which TieChoice.APART can store apart."""
    shapes = {module: tensors[name].shape for name, module in module_names(tensors, config).items()}
    ties = find_ties(list(shapes), classify(shapes, config), config)
    try:
        without_head(ties, list(shapes), config)
    except LoratoolError:
        return False
    return True


def _check_summable(name: str, placed: Sequence[PlacedUpdate]) -> None:
    for update in placed:
        if isinstance(update.update, KasaUpdate) and (len(placed) > 1 or update.weight != 1):
            raise DisagreementError(
                f"{name}: a KaSA changes the base that it adds to, so it goes in alone and with "
                "weight 1",
                details=[f"adapter {one.adapter + 1}: {one.describe()}" for one in placed],
            )
    replacing = [update for update in placed if isinstance(update.update, Replacement | TokenRows)]
    if replacing and len(placed) > 1:
        what = "one adapter replaces values of it and another changes it as well"
        if len(replacing) == len(placed):
            what = f"{len(placed)} adapters replace values of it"
        raise DisagreementError(
            f"{name}: {what}",
            details=[f"adapter {one.adapter + 1}: {one.describe()}" for one in placed],
            hint=f"merge all but one of them with --exclude {name}, one after the other",
        )
    if replacing and replacing[0].weight != 1:
        raise UsageError(
            f"{name}: the adapter replaces it, which a weight of {replacing[0].weight:g} does not "
            "apply to",
            hint="leave replaced parameters out with --exclude, or use weight 1",
        )


def _place_one(
    adapter: Adapter,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    add_bias: bool,
    choice: TieChoice,
    grow: bool,
) -> Placement:
    if not adapter.updates:
        raise NothingMatches("the adapter holds no update", hint="was everything excluded?")
    modules = module_names(tensors, config)
    stored_as = {module: name for name, module in modules.items()}
    shapes = {module: tensors[name].shape for module, name in stored_as.items()}
    kinds = classify(shapes, config, adapter_says_conv1d=adapter.fan_in_fan_out)
    ties = find_ties(list(shapes), kinds, config)
    targets = set(shapes).union(*(tie.names for tie in ties))
    asked = module_names([*adapter.updates, *adapter.base_copies], config)
    matched = match_names(asked.values(), targets)
    offers: dict[str, Offer] = {}
    if any(asked[name] in matched.missing for name in adapter.updates):
        conv1d = ModuleKind.CONV1D in kinds.values()
        offers = offered_names(shapes, config, conv1d=conv1d)
        matched = match_names(asked.values(), targets | set(offers))
    missing = [name for name in adapter.updates if asked[name] in matched.missing]
    found = {name: matched.found[asked[name]] for name in adapter.updates if name not in missing}
    new_biases = _new_biases(adapter, missing, found, stored_as)
    if new_biases and not add_bias:
        bare = counted(len(new_biases), "module that has", "modules that have")
        raise DisagreementError(
            f"the adapter trained biases (lora_bias) for {bare} none in the base: "
            f"{next(iter(new_biases.values())).target}",
            hint="--add-bias adds them, --exclude '*.bias' leaves them out",
        )
    missing = [name for name in missing if name not in new_biases]
    if missing:
        raise _nothing_matches(missing, len(adapter.updates), tensors)
    notes = [f"{matched.note} of the adapter in the base"] if matched.note else []
    by_target: dict[str, tuple[str, Update]] = {}
    for source, target in found.items():
        if target in by_target:
            raise DisagreementError(f"{target}: two updates of the adapter claim it")
        by_target[target] = (source, adapter.updates[source])
    _check_stored_once(by_target, modules)
    in_pieces = {name: by_target.pop(name) for name in list(by_target) if name in offers}
    infos = {module: tensors[name] for module, name in stored_as.items()}
    untied: dict[str, str] = {}
    if choice is TieChoice.APART:
        ties, former = without_head(ties, list(shapes), config)
        share_token_rows(former, by_target)
        main, head = former.names
        notes.append(f"{head} is no longer tied to {main}")
        if head not in stored_as:
            untied[head] = stored_as[main]
            stored_as[head], shapes[head], kinds[head] = head, shapes[main], ModuleKind.LINEAR
    for tie in ties:
        notes += settle_tie(tie, by_target, infos, share=choice is TieChoice.BOTH)
    grown: dict[str, int] = {}
    if grow:
        grown = grown_tables({name: u for name, (_, u) in by_target.items()}, shapes, kinds)
    for target, rows in grown.items():
        notes.append(f"{stored_as[target]} grows from {shapes[target][0]} to {rows} tokens")
    placed: dict[str, tuple[PlacedUpdate, ...]] = {}
    for target, (source, update) in by_target.items():
        name, shape = stored_as[target], shapes[target]
        if target in grown:
            shape = (grown[target], *shape[1:])
        placed[name] = (oriented(source, name, update, shape, kinds[target]),)
    for offered, (source, update) in in_pieces.items():
        notes.append(offers[offered].note)
        for piece in offers[offered].pieces:
            name = stored_as[piece.target]
            shape, kind = shapes[piece.target], kinds[piece.target]
            ours = on_piece(source, name, update, piece, shape, kind)
            placed[name] = (*placed.get(name, ()), ours)
    for name, together in placed.items():
        _check_apart(name, together)
        notes += _notes_on_stack(name, together, tensors[untied.get(name, name)])
    copies: dict[str, tuple[LazyTensor, ...]] = {
        stored_as[matched.found[asked[name]]]: (copy,)
        for name, copy in adapter.base_copies.items()
        if matched.found.get(asked[name]) in stored_as
    }
    added: dict[str, tuple[PlacedUpdate, ...]] = {
        update.target: (update,) for update in new_biases.values()
    }
    notes += _notes_on_squares(by_target, shapes, kinds, config)
    by_name = {stored_as[target]: rows for target, rows in grown.items()}
    return Placement(placed, copies, tuple(notes), added, untied, by_name)


def _check_stored_once(targets: Collection[str], modules: Mapping[str, str]) -> None:
    """modules: stored name → the module's parameter."""
    if len(set(modules.values())) == len(modules):
        return
    for target in targets:
        names = [name for name, module in modules.items() if module == target]
        if len(names) > 1:
            raise DisagreementError(
                f"{target}: the base stores it twice, as {' and as '.join(names)}",
                hint="take out the one that its model does not load",
            )


def _notes_on_squares(
    targets: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, ModuleKind],
    config: ModelConfig,
) -> list[str]:
    """Square weights that may be (in, out), where neither config nor shapes tell."""
    if config.uses_conv1d is not None:
        return []
    return [
        f"{name} is square, and nothing tells how it is stored: it was read as (out, in)"
        for name in targets
        if name in shapes
        and kinds[name] is ModuleKind.LINEAR
        and may_be_conv1d(name)
        and len(set(shapes[name])) == 1
        and not any(may_be_conv1d(other) and len(set(shapes[other])) > 1 for other in shapes)
    ]


def _check_apart(name: str, placed: Sequence[PlacedUpdate]) -> None:
    """Updates of one adapter must not overlap."""
    taken: set[tuple[int | None, int]] = set()
    if len(placed) < 2:
        return
    for update in placed:
        places = update.places if update.places is not None else (0,)
        rows = {(update.member, row) for row, place in enumerate(places) if place >= 0}
        whole = update.places is None and len([u for u in placed if u.member == update.member]) > 1
        if whole or taken & rows:
            raise DisagreementError(
                f"{name}: two updates of the adapter claim it",
                details=[each.source for each in placed if each.member == update.member],
            )
        taken |= rows


def _notes_on_stack(name: str, placed: Sequence[PlacedUpdate], info: TensorInfo) -> list[str]:
    """What is said of a stack of matrices; raises ShapeMismatch for another number of them."""
    members = {update.member for update in placed if update.member is not None}
    indexed = [update for update in placed if update.source.rpartition(".")[2].isdigit()]
    if not members or not indexed:
        return []
    if max(members) + 1 != info.shape[0]:
        raise ShapeMismatch(
            f"{name}: holds {info.shape[0]} matrices, the adapter has updates for "
            f"{max(members) + 1}",
            hint="another model, or r and rank_pattern of the adapter's config are not its own",
        )
    if info.shape[1] == info.shape[2]:
        side = "(in, out)" if indexed[0].transposed else "(out, in)"
        return [f"the matrices of {name.rpartition('.')[2]} are square; they were read as {side}"]
    return []


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
    updates = f"of the adapter's {counted(total, 'update')}"
    return NothingMatches(
        f"{counted(len(missing), f'{updates} matches', f'{updates} match')} no tensor of the base",
        details=details,
        hint="is this the base that the adapter was made for? merge, unmerge and verify leave out "
        "what --exclude names",
    )
