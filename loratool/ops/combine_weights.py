"""How much of each adapter goes into each weight: one number per adapter, and patterns."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratool.errors import NothingMatches, UsageError
from loratool.layouts.families import layer_of
from loratool.layouts.patterns import matches, select
from loratool.plural import counted

if TYPE_CHECKING:
    from loratool.ops.combine_plan import Combination

_FORM = "[ADAPTER@]PATTERN=W, or PATTERN=W,W,… spread over the layers"


@dataclass(frozen=True)
class Source:
    """One adapter to combine: where it is, and its weight.

    recipe: another combination that makes it first; path is only its name then. sha256: what its
    files must hash to. label: how messages call it.
    """

    path: Path
    weight: float = 1.0
    recipe: Combination | None = None
    sha256: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Without folders, for reports that travel with the result."""
        return self.path.name if self.recipe is not None else self.path.resolve().name


def names_of(sources: Sequence[Source]) -> list[str]:
    """How reports that travel call the adapters: by name, and by number where two share it."""
    names = [source.name for source in sources]
    return [
        f"{name} (adapter {number})" if names.count(name) > 1 else name
        for number, name in enumerate(names, 1)
    ]


def parse_source(text: str) -> Source:
    """``PATH`` or ``PATH:WEIGHT``; a path that exists as written is one. Raises UsageError."""
    head, _, tail = text.rpartition(":")
    if not head or Path(text).exists():
        return Source(Path(text))
    try:
        weight = float(tail)
    except ValueError:
        return Source(Path(text))
    if not math.isfinite(weight):
        raise UsageError(f"{text}: the weight {tail} is not a finite number")
    return Source(Path(head), weight)


def sources_of(paths: Sequence[Path], weights: Sequence[float] | None) -> tuple[Source, ...]:
    """Paths with a weight each, 1 where none are given. Raises UsageError."""
    if weights is None:
        weights = [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UsageError(f"{counted(len(weights), 'weight')} for {counted(len(paths), 'adapter')}")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("weights must be finite numbers")
    return tuple(Source(path, float(w)) for path, w in zip(paths, weights, strict=True))


@dataclass(frozen=True)
class WeightRule:
    """A factor on the weights of the parameters that a pattern covers.

    adapter: which one, counted from 0; None for all. values: one number, or several that are
    spread evenly over the layers and interpolated between.
    """

    pattern: str
    values: tuple[float, ...]
    adapter: int | None = None

    def factor(self, name: str, last_layer: int) -> float:
        """What the weight of a covered parameter is multiplied with.

        Names without a layer number count as the first layer.
        """
        if len(self.values) == 1:
            return self.values[0]
        layer = layer_of(name) or 0
        place = layer / max(last_layer, 1) * (len(self.values) - 1)
        low = min(int(place), len(self.values) - 2)
        share = place - low
        return self.values[low] * (1 - share) + self.values[low + 1] * share


def parse_rule(text: str, sources: Sequence[Source]) -> WeightRule:
    """``mlp=0.5``, ``A@mlp=0.5``, ``2@layers=0,1``. Raises UsageError."""
    target, equals, numbers = text.rpartition("=")
    owner, at, pattern = target.rpartition("@")
    if not equals or not pattern:
        raise UsageError(f"--weight {text!r} is not of the form {_FORM}")
    try:
        values = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        raise UsageError(f"--weight {text!r} is not of the form {_FORM}") from None
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"--weight {text!r}: weights must be finite numbers")
    return WeightRule(pattern, values, _which(owner, sources) if at else None)


def rule_text(rule: WeightRule) -> str:
    """What ``parse_rule`` reads as this rule, the adapter by its number."""
    owner = "" if rule.adapter is None else f"{rule.adapter + 1}@"
    return f"{owner}{rule.pattern}={','.join(map(repr, rule.values))}"


def _which(owner: str, sources: Sequence[Source]) -> int:
    places = [i for i, source in enumerate(sources) if str(source.path) == owner]
    if len(places) == 1:
        return places[0]
    if not places and owner.isdecimal() and 1 <= int(owner) <= len(sources):
        return int(owner) - 1
    raise UsageError(
        f"--weight: {owner!r} names {'no' if not places else 'more than one'} adapter",
        hint=f"use its path as given, or its number from 1 to {len(sources)}",
    )


def weights_of(
    names: Collection[str], sources: Sequence[Source], rules: Sequence[WeightRule]
) -> dict[str, tuple[float, ...]]:
    """Parameter → one weight per adapter: its own times every rule that covers the parameter.

    Raises NothingMatches for a rule that covers nothing, or is spread over layers that none of
    its parameters has.
    """
    for rule in rules:
        covered = select(names, [rule.pattern], ())
        if len(rule.values) > 1 and all(layer_of(name) is None for name in covered):
            raise NothingMatches(f"pattern {rule.pattern!r} covers nothing with a layer number")
    last = max((layer_of(name) or 0 for name in names), default=0)
    weights = {}
    for name in names:
        row = [source.weight for source in sources]
        for rule in rules:
            if matches(rule.pattern, name):
                for i in range(len(row)):
                    if rule.adapter in (None, i):
                        row[i] *= rule.factor(name, last)
        weights[name] = tuple(row)
    return weights
