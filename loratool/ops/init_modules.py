"""Which modules an adapter to train from has, and why others cannot have one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratool.adapter import ModuleKind
from loratool.errors import NothingMatches, UnsupportedInput, UsageError
from loratool.inits.method import Init
from loratool.layouts.config import ModelConfig
from loratool.layouts.pairs import Alignment, Pair
from loratool.layouts.patterns import select
from loratool.layouts.qkv_parts import PARTS, QkvPart, qkv_parts
from loratool.layouts.targets import targeted

_WITH_SHAPE = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.CONV, ModuleKind.EMBEDDING)
_WITH_WEIGHT = (ModuleKind.LINEAR, ModuleKind.CONV1D)


@dataclass(frozen=True)
class Chosen:
    """A module to adapt. parts: which of q, k and v, where only some of a fused matrix are; each
    then has factors of its own."""

    pair: Pair
    parts: tuple[bool, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) as the module has it, of one part where there are parts; (dim, vocabulary) of
        an embedding."""
        rows, columns = self.pair.base.shape[0], math.prod(self.pair.base.shape[1:])
        turned = self.pair.kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING)
        out, into = (columns, rows) if turned else (rows, columns)
        return (out // len(self.parts), into) if self.parts else (out, into)


def choose_modules(
    alignment: Alignment,
    config: ModelConfig,
    init: Init,
    targets: str,
    include: Sequence[str],
    exclude: Sequence[str],
    format_name: str,
) -> list[Chosen]:
    """The modules that ``targets`` means, fit for ``init`` and for the format.

    Raises NothingMatches, UsageError for parts of a fused matrix that the format cannot hold
    apart, UnsupportedInput for a module that cannot have factors.
    """
    pairs = {pair.name: pair for pair in alignment.pairs}
    kinds = {name: pair.kind for name, pair in pairs.items()}
    parts: dict[str, tuple[bool, ...]] = {}
    try:
        names = targeted(targets, kinds)
    except NothingMatches:
        offered = _offered(pairs, config)
        if not offered:
            raise
        names = targeted(targets, {**kinds, **dict.fromkeys(offered, ModuleKind.LINEAR)})
        asked = {name: offered[name] for name in names - set(pairs)}
        names &= set(pairs)
        asked = {name: part for name, part in asked.items() if part.whole not in names}
        parts = _parts_of(asked, pairs)
        names |= set(parts)
        if parts:  # else they are of matrices that are adapted as a whole
            _check_parts(asked, parts, targets, format_name)
    names &= select(list(pairs), include, exclude)
    chosen = [
        Chosen(pair, parts.get(name, ()))
        for name, pair in pairs.items()
        if name in names and len(pair.base.shape) > 1
    ]
    _check_modules([each.pair for each in chosen], init, alignment)
    if format_name == "loralib":
        _check_loralib(chosen, init)
    return chosen


def _offered(pairs: Mapping[str, Pair], config: ModelConfig) -> dict[str, QkvPart]:
    by_order: dict[str, QkvPart] = {}
    for conv1d in (False, True):
        shapes = {
            name: tuple(pair.base.shape)
            for name, pair in pairs.items()
            if (pair.kind is ModuleKind.CONV1D) is conv1d
        }
        by_order |= qkv_parts(shapes, config, conv1d=conv1d)
    return by_order


def _parts_of(asked: Mapping[str, QkvPart], names: Iterable[str]) -> dict[str, tuple[bool, ...]]:
    """Fused weight → which of q, k and v are asked for; in the order of ``names``."""
    wanted: dict[str, set[int]] = {}
    for part in asked.values():
        wanted.setdefault(part.whole, set()).add(part.part)
    return {
        whole: tuple(number in wanted[whole] for number in range(len(PARTS)))
        for whole in names
        if whole in wanted
    }


def _check_parts(
    asked: Mapping[str, QkvPart],
    parts: Mapping[str, tuple[bool, ...]],
    targets: str,
    format_name: str,
) -> None:
    """Raises UsageError where the format cannot hold these parts apart."""
    first, more = next(iter(parts)), f" (and {len(parts) - 1} like it)" if len(parts) > 1 else ""
    thirds = all(part.equal_thirds for part in asked.values())
    module = first.removesuffix(".weight")
    last = module.rpartition(".")[2]
    if format_name == "peft":
        apart = "; --format loralib gives each part its own, as the LoRA paper's library does"
        raise UsageError(
            f"--targets {targets!r}: {module}{more} holds q, k and v in one matrix, and PEFT "
            "adapts the whole of it or nothing",
            hint=f"--targets {last} adapts all three with one pair of factors"
            + (apart if thirds else ""),
        )
    if not thirds:
        raise UsageError(
            f"--targets {targets!r}: {module}{more} does not hold q, k and v as equal "
            "thirds, one after the other, which loralib needs",
            hint=f"--targets {last} adapts the whole matrix",
        )
    if len(set(parts.values())) > 1:
        raise UsageError(
            f"--targets {targets!r}: asks for different parts of different fused matrices",
            hint="a loralib file is read with one --fused-parts for all; ask for the same parts",
        )
    if sum(next(iter(parts.values()))) == 1:
        raise UsageError(
            f"--targets {targets!r}: one part of {module} alone looks in a loralib file like a "
            "whole layer, and could not be read back",
            hint=f"ask for two of q, k and v, or --targets {last} for the whole",
        )


def _check_loralib(chosen: Sequence[Chosen], init: Init) -> None:
    if init.changes_base:
        raise UsageError(
            f"{init.name} starts from the weights: --format loralib is for those that start from "
            "B = 0",
            hint="use --format peft, or kaiming or gaussian",
        )
    for each in chosen:
        if each.pair.kind not in _WITH_WEIGHT:
            raise UnsupportedInput(
                f"{each.pair.name}: is a {each.pair.kind}; --format loralib is for linear layers",
                hint="leave it out with --exclude",
            )


def _check_modules(chosen: Sequence[Pair], init: Init, alignment: Alignment) -> None:
    """Raises NothingMatches or UnsupportedInput for modules that cannot get factors."""
    if not chosen:
        raise NothingMatches("no matrix is left", hint="loosen --targets, --include, --exclude")
    allowed = _WITH_WEIGHT if init.changes_base else _WITH_SHAPE
    tied = {name for tie in alignment.ties for name in tie.names}
    for pair in chosen:
        experts = alignment.experts
        if experts.is_router(pair.name) or experts.is_retargeted(pair.name):
            raise UnsupportedInput(
                f"{pair.name}: PEFT makes no adapter for it in a mixture of experts",
                hint="leave it out with --exclude",
            )
        if pair.kind not in allowed:
            raise UnsupportedInput(
                f"{pair.name}: is a {pair.kind}; {init.name} starts "
                f"{', '.join(str(kind) for kind in allowed)}",
                hint="leave it out with --exclude",
            )
        if pair.name in tied:
            raise UnsupportedInput(
                f"{pair.name}: is tied; an adapter on one name of it cannot be merged",
                hint="leave it out with --exclude",
            )
        if init.changes_base and pair.base.dtype.name not in ("F32", "F16", "BF16"):
            raise UnsupportedInput(
                f"{pair.name}: is {pair.base.dtype.name}; {init.name} needs 16- or 32-bit floats"
            )
