"""Base and tuned checkpoint side by side: which tensor is which, and what each one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratool.adapter import ModuleKind
from loratool.errors import NothingMatches, ShapeMismatch, Unplaced
from loratool.layouts.config import ModelConfig
from loratool.layouts.kinds import classify
from loratool.layouts.names import head_model_prefix, match_names, near_misses
from loratool.layouts.ties import TiedPair, find_tie
from loratool.storage.tensors import TensorInfo

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".position_ids")
"""Buffers that older checkpoints carry and newer ones do not: constants, never trained."""


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

    tie: the tied embedding and head, in full-model names. ignored: buffers on one side only.
    notes: guesses made, to be reported.
    """

    pairs: tuple[Pair, ...]
    tie: TiedPair | None
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
    shape, Unplaced for a tied head on one side that differs from the embedding's place.
    """
    matched = match_names(tuned, base)
    notes = [f"{matched.note} of the tuned checkpoint in the base"] if matched.note else []
    config = base_config if base_config.known else tuned_config
    kinds_by_base = classify({name: info.shape for name, info in base.items()}, config)
    left_base = set(base) - set(matched.found.values())
    tied_extra = _tied_extras(base, tuned, set(matched.missing), left_base, kinds_by_base, config)
    ignored = {name for name in (*matched.missing, *left_base) if name.endswith(_BUFFERS)}
    lost = [name for name in matched.missing if name not in ignored | set(tied_extra)]
    lost_base = sorted(left_base - ignored - set(tied_extra))
    if lost or lost_base:
        raise _one_sided(lost, lost_base, base)
    full, prefix_note = _full_names(matched.found, config)
    if prefix_note:
        notes.append(prefix_note)
    pairs = [
        Pair(full[theirs], kinds_by_base[ours], base[ours], tuned[theirs])
        for theirs, ours in matched.found.items()
    ]
    for extra, partner in tied_extra.items():
        notes.append(f"{extra} is stored on one side only and compared with the tied {partner}")
        pairs.append(_extra_pair(extra, partner, base, tuned, matched.found))
    _check_shapes(pairs)
    names = [pair.name for pair in pairs]
    tie = find_tie(names, {pair.name: pair.kind for pair in pairs}, config)
    if tied_extra:
        tie = None  # one side is untied: both matrices are described on their own
    return Alignment(tuple(pairs), tie, tuple(sorted(ignored)), tuple(notes))


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
    kinds: dict[str, ModuleKind],
    config: ModelConfig,
) -> dict[str, str]:
    """A head stored by one side only → the base's embedding that stands for it on the other."""
    names = set(base) | tuned_only
    pair = find_tie(names, kinds, config)
    if pair is None or not pair.head_stored or pair.head not in tuned_only | base_only:
        return {}
    return {pair.head: pair.embedding}


def _extra_pair(
    head: str,
    embedding: str,
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    found: Mapping[str, str],
) -> Pair:
    tuned_embedding = next(theirs for theirs, ours in found.items() if ours == embedding)
    return Pair(
        head,
        ModuleKind.LINEAR,
        base.get(head, base[embedding]),
        tuned.get(head, tuned[tuned_embedding]),
    )


def _full_names(found: Mapping[str, str], config: ModelConfig) -> tuple[dict[str, str], str | None]:
    """tuned name → the name that the full model gives the parameter."""
    full = {theirs: max(theirs, ours, key=len) for theirs, ours in found.items()}
    prefix = head_model_prefix(full.values(), config)
    if not prefix:
        return full, None
    heads = ("lm_head.", "classifier.", "score.", "qa_outputs.", "cls.")
    renamed = {
        theirs: name if name.startswith(heads) else prefix + name for theirs, name in full.items()
    }
    return (
        renamed,
        f"modules are named with the prefix {prefix!r}, which {config.architecture} adds",
    )


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
