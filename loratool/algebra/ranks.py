"""Rank rules: how many components of a spectrum an adapter keeps.

A rule is one registered function from a Spectrum and a number to a rank, or to None when the
values resolved so far do not decide it (the factoriser then resolves more). Users write
``NAME:NUMBER``, ``NAME`` or just a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loratool.algebra.spectrum import Spectrum
from loratool.errors import UsageError

Chooser = Callable[[Spectrum, float], int | None]


@dataclass(frozen=True)
class RuleKind:
    """A registered rule: its function, what its number may be, and one line for help and docs."""

    name: str
    choose: Chooser
    argument: Callable[[float], bool] | None
    expects: str
    summary: str


REGISTRY: dict[str, RuleKind] = {}


def rank_rule(
    name: str, *, argument: Callable[[float], bool] | None = None, expects: str = ""
) -> Callable[[Chooser], Chooser]:
    """Register a rule under ``name``; ``argument`` says which numbers it accepts."""

    def register(choose: Chooser) -> Chooser:
        summary = (choose.__doc__ or "").strip().splitlines()[0]
        REGISTRY[name] = RuleKind(name, choose, argument, expects, summary)
        return choose

    return register


@dataclass(frozen=True)
class RankRule:
    """A rule with its number, as the user asked for it."""

    kind: RuleKind
    value: float

    def __call__(self, spectrum: Spectrum) -> int | None:
        """The rank, between 0 and the matrix's smaller side; None when more values are needed."""
        rank = self.kind.choose(spectrum, self.value)
        return None if rank is None else min(rank, min(spectrum.shape))

    def first_guess(self, shape: tuple[int, int]) -> int:
        """How many values to resolve at first."""
        if self.kind.name == "fixed":
            return min(int(self.value), min(shape))
        return min(shape) if self.kind.name == "full" else min(32, min(shape))

    def __str__(self) -> str:
        if self.kind.argument is None:
            return self.kind.name
        number = f"{self.value:g}"
        return number if self.kind.name == "fixed" else f"{self.kind.name}:{number}"


def parse_rank_rule(text: str) -> RankRule:
    """Read ``16``, ``full``, ``energy:0.95``. Raises UsageError naming the choices."""
    name, _, number = text.strip().partition(":")
    if not number and _number(name) is not None:
        name, number = "fixed", name
    kind = REGISTRY.get(name)
    if kind is None:
        raise UsageError(f"unknown rank rule {text!r}", details=_choices())
    if kind.argument is None:
        if number:
            raise UsageError(f"rank rule {name!r} takes no number")
        return RankRule(kind, 0.0)
    value = _number(number)
    if value is None or not kind.argument(value):
        raise UsageError(f"rank {text!r}: {name} needs {kind.expects}", details=_choices())
    return RankRule(kind, value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _choices() -> list[str]:
    return [
        f"{kind.name}{':NUMBER' if kind.argument else ''}  {kind.summary}"
        for kind in REGISTRY.values()
    ]


def _is_share(value: float) -> bool:
    return 0 < value <= 1


@rank_rule("fixed", argument=lambda v: v >= 1 and v == int(v), expects="a whole number above 0")
def fixed(spectrum: Spectrum, rank: float) -> int | None:
    """This many components (a bare number means this)."""
    return int(rank) if len(spectrum.values) >= min(int(rank), *spectrum.shape) else None


@rank_rule("full")
def full(spectrum: Spectrum, _: float) -> int | None:
    """The change itself, without any approximation."""
    return min(spectrum.shape) if spectrum.is_complete else None


@rank_rule("energy", argument=_is_share, expects="a share above 0 and up to 1")
def energy(spectrum: Spectrum, share: float) -> int | None:
    """Smallest rank whose components hold this share of ‖D‖²."""
    return spectrum.first_rank_where(spectrum.energy_share() >= share)


@rank_rule("error", argument=lambda v: 0 <= v < 1, expects="a relative error from 0 to below 1")
def error(spectrum: Spectrum, relative: float) -> int | None:
    """Smallest rank with ‖D − D_r‖ ≤ this share of ‖D‖."""
    return spectrum.first_rank_where(spectrum.energy_share() >= 1 - relative**2)


@rank_rule("ratio", argument=_is_share, expects="a ratio above 0 and up to 1")
def ratio(spectrum: Spectrum, share: float) -> int | None:
    """Every component with σ ≥ this share of the largest σ."""
    return _count_at_least(spectrum, share * float(spectrum.values[0]))


@rank_rule("absolute", argument=lambda v: v > 0, expects="a singular value above 0")
def absolute(spectrum: Spectrum, threshold: float) -> int | None:
    """Every component with σ ≥ this value."""
    return _count_at_least(spectrum, threshold)


def _count_at_least(spectrum: Spectrum, threshold: float) -> int | None:
    count = int((spectrum.values >= threshold).sum())
    return count if count < len(spectrum.values) or spectrum.is_complete else None
