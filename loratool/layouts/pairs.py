"""Base and tuned checkpoint side by side: which tensor is which, and what each one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.adapter import ModuleKind
from loratool.errors import NothingMatches, ShapeMismatch, Unplaced
from loratool.layouts.config import ModelConfig
from loratool.layouts.experts import Experts, find_experts
from loratool.layouts.kinds import classify
from loratool.layouts.names import head_model_prefix, match_names, near_misses
from loratool.layouts.renames import module_names
from loratool.layouts.ties import Tie, find_ties, same_values
from loratool.storage.tensors import TensorInfo

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
    """One parameter in both checkpoints. ``name`` is the full model's name for it."""

    name: str
    kind: ModuleKind
    base: TensorInfo
    tuned: TensorInfo


@dataclass(frozen=True)
class Alignment:
    """All parameters of two checkpoints, paired.

    ties: names of one parameter, in full-model names. experts: what of it is a mixture of
    experts. ignored: buffers on one side only.
    notes: guesses made, to be reported.
    """

    pairs: tuple[Pair, ...]
    ties: tuple[Tie, ...]
    experts: Experts
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def align(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    base_config: ModelConfig,
    tuned_config: ModelConfig,
) -> Alignment:
    """Pair the tensors of base and tuned.

    Raises NothingMatches for tensors on one side only, ShapeMismatch for pairs that differ in
    shape.
    """
    matched = match_names(tuned, base)
    notes = [f"{matched.note} of the tuned checkpoint in the base"] if matched.note else []
    config = base_config if base_config.known else tuned_config
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
    ours_to_full = {ours: full[theirs] for theirs, ours in matched.found.items()}
    untied = set()
    for extra, partner in extras.items():
        if _still_tied(extra, partner, base, tuned, matched.found):
            notes.append(f"{extra} is stored on one side only and equals the tied {partner}")
            continue
        pair = _extra_pair(extra, partner, base, tuned, matched.found, kinds_by_base)
        notes.append(f"{extra} is stored on one side only and compared with the tied {partner}")
        pairs.append(pair)
        untied |= {pair.name, ours_to_full[partner]}
    _check_shapes(pairs)
    ties = find_ties(
        [pair.name for pair in pairs], {pair.name: pair.kind for pair in pairs}, config
    )
    # where one side is untied, each matrix is described on its own
    ties = tuple(tie for tie in ties if not untied & set(tie.names))
    experts = find_experts(pair.name for pair in pairs)
    return Alignment(tuple(pairs), ties, experts, tuple(sorted(ignored)), tuple(notes))


def _is_buffer(name: str, info: TensorInfo) -> bool:
    return name.endswith(_BUFFERS) or (name.endswith(_MASKS) and len(info.shape) == 4)


def _one_sided(lost: list[str], lost_base: list[str], base: Mapping[str, TensorInfo]) -> Exception:
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
        f"{total} tensors are in one checkpoint only",
        details=details,
        hint="base and tuned must be the same architecture; is this the right base?",
    )


def _tied_extras(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
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
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
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
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    found: Mapping[str, str],
) -> bool:
    """Whether the side that stores both names stores the same values: transformers then ties."""
    side, other = (base, partner) if extra in base else (tuned, _theirs(partner, found))
    return same_values(side[extra], side[other])


def _theirs(ours: str, found: Mapping[str, str]) -> str:
    return next(theirs for theirs, name in found.items() if name == ours)


def _full_names(found: Mapping[str, str], config: ModelConfig) -> tuple[dict[str, str], list[str]]:
    """tuned name → the name that the full model gives the parameter, and what was assumed."""
    full = {theirs: max(theirs, ours, key=len) for theirs, ours in found.items()}
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
    modules = module_names(full.values(), config)
    renamed = next((pair for pair in modules.items() if pair[0] != pair[1]), None)
    if renamed is not None:
        notes.append(f"modules are named as transformers 5 does ({renamed[1]} for {renamed[0]})")
    return {theirs: modules[name] for theirs, name in full.items()}, notes


def _check_shapes(pairs: list[Pair]) -> None:
    wrong = [pair for pair in pairs if pair.base.shape != pair.tuned.shape]
    if wrong:
        raise ShapeMismatch(
            f"{len(wrong)} tensors differ in shape between base and tuned",
            details=[
                f"{pair.name}: base {list(pair.base.shape)}, tuned {list(pair.tuned.shape)}"
                for pair in wrong[:12]
            ],
            hint="a resized vocabulary or another architecture? base and tuned must agree",
        )


def check_floats(pairs: list[Pair]) -> list[Pair]:
    """The pairs that hold floating point values on both sides.

    Raises Unplaced where only one side does, since nothing meaningful can be subtracted.
    """
    floats = []
    for pair in pairs:
        if pair.base.dtype.is_float and pair.tuned.dtype.is_float:
            floats.append(pair)
        elif pair.base.dtype.is_float or pair.tuned.dtype.is_float:
            raise Unplaced(
                f"{pair.name}: is {pair.base.dtype.name} in base and {pair.tuned.dtype.name} in "
                "tuned; quantised weights cannot be compared"
            )
    return floats
