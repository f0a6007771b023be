"""Base and tuned checkpoint side by side: which tensor is which, and what each one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from loratool.adapter import ModuleKind
from loratool.errors import NothingMatches, ShapeMismatch, Unplaced
from loratool.layouts.config import ModelConfig
from loratool.layouts.experts import Experts, by_expert, find_experts, has_stacked
from loratool.layouts.fused import refit
from loratool.layouts.kinds import classify, is_over_vocabulary
from loratool.layouts.names import (
    head_model_prefix,
    match_names,
    model_name,
    near_misses,
    unwrapped,
)
from loratool.layouts.renames import has_unknown_names, module_names
from loratool.layouts.ties import Tie, find_ties, same_values
from loratool.plural import counted
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Stored, rows_of

_BUFFERS = (".masked_bias", ".rotary_emb.inv_freq", ".position_ids")
_MASKS = (".attn.bias", ".attention.bias")
"""Buffers that older checkpoints carry and newer ones do not: constants, never trained."""
_HEADS = (
    "lm_head.",
    "embed_out.",
    "proj_out.",
    "cls.",
    "predictions.",
    "vocab_",
    "generator_",
    "classifier.",
    "score.",
    "qa_outputs.",
    "classification_head.",
    "pre_classifier.",
)
"""What a head model keeps outside the part that bears its prefix."""


@dataclass(frozen=True)
class Pair:
    """One parameter in both checkpoints, or one matrix of it. ``name`` is the full model's name.

    base, tuned: of equal shapes. grown: the whole tuned table where it has more rows (tokens)
    than the base's; ``tuned`` is then its first rows. input_first: whether an expert's matrix is
    stored as (in, out).
    """

    name: str
    kind: ModuleKind
    base: Stored
    tuned: Stored
    grown: Stored | None = None
    input_first: bool = False

    @property
    def whole(self) -> Stored:
        """The tuned values, tokens that were added included."""
        return self.grown or self.tuned

    @property
    def added_rows(self) -> int:
        """Rows that the tuned side has beyond the base's."""
        return self.whole.rows - self.tuned.rows if self.grown else 0


@dataclass(frozen=True)
class Alignment:
    """All parameters of two checkpoints, paired.

    ties: names of one parameter, in full-model names. experts: what of it is a mixture of
    experts. ignored: buffers on one side only. untied: names that are one parameter on one side.
    notes: guesses made, to be reported.
    """

    pairs: tuple[Pair, ...]
    ties: tuple[Tie, ...]
    experts: Experts
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    untied: tuple[str, ...] = ()

    @property
    def repeats(self) -> dict[str, str]:
        """Further names under which a tied parameter is stored → the first."""
        return {name: tie.main for tie in self.ties for name in tie.stored - {tie.main}}


def align(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    base_config: ModelConfig,
    tuned_config: ModelConfig,
) -> Alignment:
    """Pair the tensors of base and tuned, whatever names and layout each side stores them in.

    Raises NothingMatches for tensors on one side only, ShapeMismatch for pairs that differ in
    shape.
    """
    config = base_config if base_config.known else tuned_config
    base, unwrapping = unwrapped(base, "base")
    tuned, also = unwrapped(tuned, "tuned")
    ours, notes = _as_loaded(base, config)
    notes = [*unwrapping, *also, *notes]
    theirs, _ = _as_loaded(tuned, tuned_config if tuned_config.known else config)
    refitted = refit(theirs, ours)
    if refitted.note:
        notes.append(f"{refitted.note}, as the base has it")
    alignment = _align(ours, refitted.tensors, config)
    stored = {new: base[name] for name, new in module_names(base, config).items()}
    experts = find_experts(
        (pair.name for pair in alignment.pairs), config, stacked=has_stacked(stored)
    )
    pairs = tuple(
        replace(pair, input_first=experts.is_input_first(pair.name)) for pair in alignment.pairs
    )
    return replace(alignment, pairs=pairs, experts=experts, notes=(*notes, *alignment.notes))


def _as_loaded(
    tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors by the names that transformers 5 gives them, experts one by one."""
    modules = module_names(tensors, config)
    renamed = next((pair for pair in modules.items() if pair[0] != pair[1]), None)
    notes = []
    if renamed is not None:
        notes.append(f"modules are named as transformers 5 does ({renamed[1]} for {renamed[0]})")
    if has_unknown_names(config):
        notes.append(
            f"transformers 5 has other names for modules of {config.model_type} than files have, "
            "not all of them known here; PEFT ignores what it finds no module for: compare outputs"
        )
    return by_expert({modules[name]: info for name, info in tensors.items()}, config), notes


def _align(
    base: Mapping[str, Stored], tuned: Mapping[str, Stored], config: ModelConfig
) -> Alignment:
    matched = match_names(tuned, base)
    notes = [f"{matched.note} of the tuned checkpoint in the base"] if matched.note else []
    kinds_by_base = classify({name: info.shape for name, info in base.items()}, config)
    left_base = set(base) - set(matched.found.values())
    extras = _tied_extras(base, tuned, set(matched.missing), left_base, kinds_by_base, config)
    one_sided = {*matched.missing, *left_base}
    ignored = {name for name in one_sided if _is_buffer(name, base.get(name) or tuned[name])}
    lost = [name for name in matched.missing if name not in ignored | set(extras)]
    lost_base = sorted(left_base - ignored - set(extras))
    if lost or lost_base:
        raise _one_sided(lost, lost_base, base)
    full, full_notes = _full_names(matched.found, config)
    notes += full_notes
    pairs = [
        Pair(full[theirs], kinds_by_base[ours], base[ours], tuned[theirs])
        for theirs, ours in matched.found.items()
    ]
    for extra, partner in extras.items():
        if _still_tied(extra, partner, base, tuned, matched.found):
            notes.append(f"{extra} is stored on one side only and equals the tied {partner}")
            continue
        notes.append(f"{extra} is stored on one side only and compared with the tied {partner}")
        pairs.append(_extra_pair(extra, partner, base, tuned, matched.found, kinds_by_base))
    pairs = [_with_added_rows(pair) for pair in pairs]
    _check_shapes(pairs)
    grown = next((pair for pair in pairs if pair.grown), None)
    if grown is not None:
        notes.append(f"the vocabulary grew from {grown.tuned.rows} to {grown.whole.rows} tokens")
    ties = find_ties(
        [pair.name for pair in pairs], {pair.name: pair.kind for pair in pairs}, config
    )
    ties, untied = _equal_ties(ties, {pair.name: pair for pair in pairs})
    experts = Experts(frozenset(), frozenset())
    return Alignment(tuple(pairs), ties, experts, tuple(sorted(ignored)), tuple(notes), untied)


def _is_buffer(name: str, info: Stored) -> bool:
    return name.endswith(_BUFFERS) or (name.endswith(_MASKS) and len(info.shape) == 4)


def _one_sided(lost: list[str], lost_base: list[str], base: Mapping[str, Stored]) -> Exception:
    details = [
        f"only in tuned: {name}"
        + (f"   closest in base: {alike[0]}" if (alike := near_misses(name, base)) else "")
        for name in lost[:8]
    ]
    details += [f"only in base: {name}" for name in lost_base[:8]]
    total = len(lost) + len(lost_base)
    shown = len(details)
    if total > shown:
        details.append(f"… {total - shown} more")
    return NothingMatches(
        f"{counted(total, 'tensor is', 'tensors are')} in one checkpoint only",
        details=details,
        hint="base and tuned must be the same architecture; is this the right base?",
    )


def _tied_extras(
    base: Mapping[str, Stored],
    tuned: Mapping[str, Stored],
    tuned_only: set[str],
    base_only: set[str],
    kinds: Mapping[str, ModuleKind],
    config: ModelConfig,
) -> dict[str, str]:
    """A tied name stored by one side only → the base's name that stands for it on the other."""
    extras: dict[str, str] = {}
    one_sided = tuned_only | base_only
    on_both = {name: kind for name, kind in kinds.items() if name not in one_sided}
    for tie in find_ties(set(base) | tuned_only, on_both, config):
        both = [name for name in tie.names if name in base and name not in one_sided]
        if both:
            extras |= {name: both[0] for name in tie.names if name in one_sided}
    return extras


def _extra_pair(
    extra: str,
    partner: str,
    base: Mapping[str, Stored],
    tuned: Mapping[str, Stored],
    found: Mapping[str, str],
    kinds: Mapping[str, ModuleKind],
) -> Pair:
    is_bias = kinds[partner] is ModuleKind.BIAS
    return Pair(
        extra,
        ModuleKind.BIAS if is_bias else ModuleKind.LINEAR,
        base.get(extra, base[partner]),
        tuned.get(extra, tuned[_theirs(partner, found)]),
    )


def _still_tied(
    extra: str,
    partner: str,
    base: Mapping[str, Stored],
    tuned: Mapping[str, Stored],
    found: Mapping[str, str],
) -> bool:
    """Whether the side that stores both names stores the same values: transformers then ties."""
    side, other = (base, partner) if extra in base else (tuned, _theirs(partner, found))
    return same_values(side[extra], side[other])


def _equal_ties(
    ties: Sequence[Tie], pairs: Mapping[str, Pair]
) -> tuple[tuple[Tie, ...], tuple[str, ...]]:
    """The ties without stored names whose values differ from the first's on a side, which are
    matrices of their own; and the names that are one in base and several in tuned."""
    kept, untied = [], set()
    for tie in ties:
        off = set()
        for name in tie.stored - {tie.main}:
            one, other = pairs[tie.main], pairs[name]
            if not same_values(one.base, other.base):
                off.add(name)
            elif not same_values(one.whole, other.whole):
                off.add(name)
                untied |= {tie.main, name}
        names = tuple(name for name in tie.names if name not in off)
        if len(names) > 1:
            kept.append(Tie(names, tie.stored - off))
    return tuple(kept), tuple(sorted(untied))


def _theirs(ours: str, found: Mapping[str, str]) -> str:
    return next(theirs for theirs, name in found.items() if name == ours)


def _full_names(found: Mapping[str, str], config: ModelConfig) -> tuple[dict[str, str], list[str]]:
    """tuned name → the name that the full model gives the parameter, and what was assumed."""
    one, two = set(found), set(found.values())
    shorter = one if sum(map(len, one)) < sum(map(len, two)) else two
    full = {theirs: model_name(ours, theirs, shorter, config) for theirs, ours in found.items()}
    notes = []
    prefix = head_model_prefix(full.values(), config)
    if prefix:
        notes.append(
            f"modules are named with the prefix {prefix!r}, which {config.architecture} adds"
        )
        full = {
            theirs: name if name.startswith(_HEADS) else prefix + name
            for theirs, name in full.items()
        }
    return full, notes


def _with_added_rows(pair: Pair) -> Pair:
    """A table over the vocabulary with tokens added: its old rows are the pair."""
    rows = pair.base.rows
    if (
        is_over_vocabulary(pair.name, pair.kind)
        and pair.base.shape[1:] == pair.tuned.shape[1:]
        and pair.tuned.rows > rows
    ):
        return replace(pair, tuned=rows_of(pair.tuned, 0, rows), grown=pair.tuned)
    return pair


def _check_shapes(pairs: list[Pair]) -> None:
    wrong = [pair for pair in pairs if pair.base.shape != pair.tuned.shape]
    if wrong:
        raise ShapeMismatch(
            f"{counted(len(wrong), 'tensor differs', 'tensors differ')} in shape between base and "
            "tuned",
            details=[
                f"{pair.name}: base {list(pair.base.shape)}, tuned {list(pair.tuned.shape)}"
                for pair in wrong[:12]
            ],
            hint=_hint_on_growth(pairs)
            or "tokens added to the tuned side are taken over, tokens removed from it are not; "
            "another architecture? base and tuned must agree",
        )


def _hint_on_growth(pairs: list[Pair]) -> str | None:
    """Where tables got tokens and something else over the vocabulary (BART's final_logits_bias)
    became longer as well."""
    grown = next((pair for pair in pairs if pair.grown), None)
    if grown is None:
        return None
    rows = grown.whole.rows
    return (
        f"tokens are added to tables alone: bring the base to {rows} tokens first "
        f"(resize_token_embeddings({rows}), save_pretrained), and extract from that"
    )


def check_floats(pairs: list[Pair]) -> list[Pair]:
    """The pairs that hold floating point values on both sides, and any at all.

    Raises Unplaced where only one side does, since nothing meaningful can be subtracted.
    """
    floats = []
    for pair in pairs:
        if pair.base.dtype.is_float and pair.tuned.dtype.is_float:
            if pair.base.numel:
                floats.append(pair)
        elif pair.base.dtype.is_float or pair.tuned.dtype.is_float:
            raise Unplaced(
                f"{pair.name}: is {pair.base.dtype.name} in base and {pair.tuned.dtype.name} in "
                "tuned; quantised weights cannot be compared"
            )
    return floats
