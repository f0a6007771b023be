"""What an extraction makes of each tensor if it changed, by what PEFT can store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from loratool.adapter import ModuleKind, module_of
from loratool.errors import UsageError
from loratool.layouts.convolutions import is_grouped, is_transposed
from loratool.layouts.pairs import Alignment, Pair
from loratool.layouts.past_modules import is_read_past_its_module
from loratool.ops.extract_adapter import in_task_head, is_saved_with
from loratool.ops.extract_jobs import Treatment
from loratool.ops.extract_rules import Rules
from loratool.ops.sources import Model
from loratool.plural import counted

LOW_RANK_KINDS = (
    ModuleKind.LINEAR,
    ModuleKind.CONV1D,
    ModuleKind.EMBEDDING,
    ModuleKind.EXPERT,
)
_PARAMETRISED = ".parametrizations."
"""In the names of what torch computes a weight from: weight norms. PEFT wraps no such module."""
_STORABLE = (ModuleKind.NORM, ModuleKind.BIAS, ModuleKind.POSITION)


def treatments(
    alignment: Alignment, base: Model, rules: Rules, chosen: Collection[str]
) -> dict[str, Treatment]:
    """The treatment of every pair, by name. chosen: those that are not left out.

    Raises UsageError for experts that are asked to be stored whole.
    """
    _refuse_whole_experts([pair for pair in alignment.pairs if pair.name in chosen], rules)
    shapes = {pair.name: pair.base.shape for pair in alignment.pairs}
    found = {
        pair.name: _treatment(pair, shapes, alignment, base, rules) for pair in alignment.pairs
    }
    for owner, members in _owners_of_bare_parameters(alignment.pairs, chosen):
        apart = [
            pair
            for pair in members
            if found[pair.name] is Treatment.LOW_RANK and pair.kind is not ModuleKind.CONV
        ]
        if owner and not apart and not any(_is_namesake(pair.name, owner) for pair in members):
            found |= {pair.name: Treatment.WHOLE for pair in members}
    return found | _namesakes(alignment.pairs, found)


def _is_namesake(name: str, owner: str) -> bool:
    """Whether a module inside of ``owner`` has a name that ends like its: PEFT (0.21) would save
    it twice, and find it once in the file."""
    return is_saved_with(name.removeprefix(f"{owner}."), [owner])


def _namesakes(pairs: Sequence[Pair], found: Mapping[str, Treatment]) -> dict[str, Treatment]:
    """Matrices that PEFT saves whole because another module is, whose name is the end of theirs."""
    whole = {
        module_of(pair.name)
        for pair in pairs
        if found[pair.name] is Treatment.WHOLE and pair.kind is not ModuleKind.BIAS
    }
    return {
        pair.name: Treatment.WHOLE
        for pair in pairs
        if found[pair.name] is Treatment.LOW_RANK and is_saved_with(pair.name, whole)
    }


def _refuse_whole_experts(pairs: Sequence[Pair], rules: Rules) -> None:
    """PEFT stores modules whole, and the experts of a layer are one; a single one it would not
    find."""
    whole = [p.name for p in pairs if p.kind is ModuleKind.EXPERT and rules.of(p) is None]
    if whole:
        raise UsageError(
            f"--rank-for: {counted(len(whole), 'expert')} cannot be stored whole, only as factors",
            details=whole[:12],
            hint="full in place of whole keeps all of their change, to the rounding of --dtype",
        )


def is_grouped_convolution(pair: Pair, base: Model) -> bool:
    """Whether a pair is a convolution that PEFT would not merge."""
    kind, shape = pair.kind, pair.base.shape
    return kind is ModuleKind.CONV and is_grouped(pair.name, shape, base.config)


def _treatment(
    pair: Pair,
    shapes: Mapping[str, tuple[int, ...]],
    alignment: Alignment,
    base: Model,
    rules: Rules,
) -> Treatment:
    if not pair.base.dtype.is_float or not module_of(pair.name) or _PARAMETRISED in pair.name:
        return Treatment.NO_PLACE
    if in_task_head(pair.name, base.config.task_type):
        return Treatment.WHOLE  # PEFT saves a task's head whole, whatever the config lists
    if pair.added_rows and pair.kind is not ModuleKind.BIAS:
        return Treatment.NEW_ROWS  # PEFT has no update of old rows beside values for new ones
    if any(pair.name in tie.names for tie in alignment.ties):
        return Treatment.WHOLE  # the one form on which PEFT, its merge and ours agree
    if pair.kind in (*LOW_RANK_KINDS, ModuleKind.CONV):
        whole = alignment.experts.is_router(pair.name) or is_grouped_convolution(pair, base)
        whole |= is_read_past_its_module(pair.name, shapes, base.config)
        whole |= pair.kind is ModuleKind.CONV and is_transposed(
            pair.name, pair.base.shape, shapes.get(f"{module_of(pair.name)}.bias")
        )
        return Treatment.WHOLE if whole or rules.of(pair) is None else Treatment.LOW_RANK
    return Treatment.WHOLE if pair.kind in _STORABLE else Treatment.NO_PLACE


def _owners_of_bare_parameters(
    pairs: Sequence[Pair], chosen: Collection[str]
) -> Iterator[tuple[str, list[Pair]]]:
    """Modules with parameters that are no weight or bias, and all pairs inside each: PEFT stores
    such a parameter with its whole module."""
    owners = {
        module_of(pair.name)
        for pair in pairs
        if pair.kind is ModuleKind.OTHER
        and pair.base.dtype.is_float
        and pair.name in chosen
        and _PARAMETRISED not in pair.name
    }
    for owner in owners:
        yield owner, [pair for pair in pairs if pair.name.startswith(f"{owner}.")]
