"""Rank rules: how many components of a spectrum an adapter keeps.

A rule is one registered function from a Spectrum and a number to a rank, or to None when the
values resolved so far do not decide it (the factoriser then resolves more). Users write
``NAME:NUMBER``, ``NAME`` or just a number. Limits (at least, at most, multiples) apply to the
result of any rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from loratool.algebra.spectrum import Spectrum
from loratool.errors import UsageError

Chooser = Callable[[Spectrum, float], int | None]

FIRST_GUESS = 32
"""Values that a rule without a known rank looks at first."""


@dataclass(frozen=True)
class RuleKind:
    """A registered rule.

    argument: which numbers it accepts; None when it takes none. default: the number when the user
    gives none. needs_all: it looks at every singular value, whatever the largest rank allowed.
    """

    name: str
    choose: Chooser
    argument: Callable[[float], bool] | None
    expects: str
    default: float | None
    needs_all: bool
    summary: str


REGISTRY: dict[str, RuleKind] = {}


def rank_rule(
    name: str,
    *,
    argument: Callable[[float], bool] | None = None,
    expects: str = "",
    default: float | None = None,
    needs_all: bool = False,
) -> Callable[[Chooser], Chooser]:
    """Register a rule under ``name``; the first line of its docstring is its description."""

    def register(choose: Chooser) -> Chooser:
        summary = (choose.__doc__ or "").strip().splitlines()[0]
        REGISTRY[name] = RuleKind(name, choose, argument, expects, default, needs_all, summary)
        return choose

    return register


@dataclass(frozen=True)
class RankLimits:
    """Bounds on whatever a rule says: at least, at most, and rounded up to a multiple.

    The matrix's smaller side is always a limit, and comes before the others.
    """

    least: int = 1
    most: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.least < 1 or self.multiple < 1 or (self.most is not None and self.most < 1):
            raise UsageError("rank limits must be at least 1")
        if self.most is not None and self.least > self.most:
            raise UsageError(f"--min-rank {self.least} is above --max-rank {self.most}")
        if self.most is not None and -(-self.least // self.multiple) * self.multiple > self.most:
            between = (
                f"from {self.least} to {self.most}" if self.least > 1 else f"up to {self.most}"
            )
            raise UsageError(f"no rank {between} is a multiple of {self.multiple}")

    def apply(self, rank: int, shape: tuple[int, int]) -> int:
        """The rank within the limits; 0 (keep nothing) stays 0 unless a least rank was asked."""
        if rank <= 0 and self.least <= 1:
            return 0
        rank = max(rank, self.least)
        rank = -(-rank // self.multiple) * self.multiple
        if self.most is not None and rank > self.most:
            rank = self.most - self.most % self.multiple
        return min(rank, *shape)


@dataclass(frozen=True)
class RankRule:
    """A rule with its number and limits, as the user asked for it."""

    kind: RuleKind
    value: float
    limits: RankLimits = field(default_factory=RankLimits)

    def __call__(self, spectrum: Spectrum) -> int | None:
        """The rank, between 0 and the matrix's smaller side; None when more values are needed."""
        cap, seen = self.limits.most, len(spectrum.values)
        rank = self.kind.choose(spectrum, self.value)
        if rank is None:
            if cap is None or seen < cap or self.kind.needs_all:
                return None
            rank = cap  # or more
        limited = self.limits.apply(min(rank, min(spectrum.shape)), spectrum.shape)
        return limited if limited <= seen else None

    def first_guess(self, shape: tuple[int, int]) -> int:
        """How many values to resolve at first."""
        side = min(shape)
        most = min(side, self.limits.most or side)
        if self.kind.name == "fixed":
            return self.limits.apply(min(int(self.value), side), shape)
        if self.kind.needs_all:
            return side
        if self.kind.name == "full":
            return most
        return max(min(FIRST_GUESS, most), min(self.limits.least, most))

    def likely(self, shape: tuple[int, int]) -> int:
        """A rank to reckon with before any value is known."""
        return min(self.first_guess(shape), self.most(shape))

    def most(self, shape: tuple[int, int]) -> int:
        """The largest rank that the rule can say, whatever the spectrum."""
        fixed = self.kind.name == "fixed"
        return self.first_guess(shape) if fixed else self.limits.apply(min(shape), shape)

    @property
    def asked(self) -> int:
        """The rank that was asked for in so many words, as a number or as the least; else 1."""
        return max(int(self.value) if self.kind.name == "fixed" else 1, self.limits.least)

    def clamps(self, rank: int) -> bool:
        """Whether ``rank`` is less than what was asked for."""
        return rank < self.asked

    def __str__(self) -> str:
        """As it can be asked for; of two rules alike only where they are one."""
        if self.kind.argument is None:
            return self.kind.name
        whole = self.value.is_integer() and abs(self.value) < 1e16
        number = str(int(self.value) if whole else self.value)
        return number if self.kind.name == "fixed" else f"{self.kind.name}:{number}"


def parse_rank_rule(text: str, limits: RankLimits | None = None) -> RankRule:
    """Read ``16``, ``full``, ``energy:0.95``. Raises UsageError naming the choices."""
    limits = limits or RankLimits()
    name, colon, number = text.strip().partition(":")
    if not colon and _number(name) is not None:
        name, number = "fixed", name
    if name == "budget":
        raise UsageError(f"rank {text!r}: a budget is budget:SIZE, for all matrices together")
    kind = REGISTRY.get(name)
    if kind is None:
        raise UsageError(f"unknown rank rule {text!r}", details=_choices())
    if kind.argument is None:
        if number:
            raise UsageError(f"rank rule {name!r} takes no number")
        return RankRule(kind, 0.0, limits)
    value = _number(number) if number else kind.default
    if value is None or not kind.argument(value):
        raise UsageError(f"rank {text!r}: {name} needs {kind.expects}", details=_choices())
    return RankRule(kind, value, limits)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _choices() -> list[str]:
    return [
        f"{kind.name}{':NUMBER' if kind.argument else ''}  {kind.summary}"
        for kind in REGISTRY.values()
    ]


def _is_share(value: float) -> bool:
    return 0 < value <= 1


SHARE = "a share above 0 and up to 1"


# Rules that a growing sketch can decide -------------------------------------------------------


@rank_rule("fixed", argument=lambda v: v >= 1 and v == int(v), expects="a whole number above 0")
def fixed(spectrum: Spectrum, rank: float) -> int | None:
    """This many components (a bare number means this)."""
    return int(rank) if len(spectrum.values) >= min(int(rank), *spectrum.shape) else None


@rank_rule("full")
def full(spectrum: Spectrum, _: float) -> int | None:
    """The change itself, without any approximation."""
    return min(spectrum.shape) if spectrum.is_complete else None


@rank_rule("energy", argument=_is_share, expects=SHARE)
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
    return _count(spectrum, spectrum.values >= share * float(spectrum.values[0]))


@rank_rule("absolute", argument=lambda v: v > 0, expects="a singular value above 0")
def absolute(spectrum: Spectrum, threshold: float) -> int | None:
    """Every component with σ ≥ this value."""
    return _count(spectrum, spectrum.values >= threshold)


@rank_rule("auto")
def auto(spectrum: Spectrum, _: float) -> int | None:
    """Every component above the noise floor that the checkpoints' rounding sets."""
    return _count(spectrum, spectrum.above(spectrum.noise_floor))


@rank_rule("stable")
def stable(spectrum: Spectrum, _: float) -> int | None:
    """The stable rank ‖D‖²/σ₁², rounded up."""
    return math.ceil(spectrum.stable_rank() * (1 - 1e-12))


def _count(spectrum: Spectrum, kept: Tensor) -> int | None:
    count = int(kept.sum())
    return count if count < len(spectrum.values) or spectrum.is_complete else None


# Rules that look at the whole spectrum --------------------------------------------------------


@rank_rule("nuclear", argument=_is_share, expects=SHARE, needs_all=True)
def nuclear(spectrum: Spectrum, share: float) -> int | None:
    """Smallest rank whose components hold this share of Σσ."""
    return _first_cumulative(spectrum, share, extra=1)


@rank_rule("quantile", argument=_is_share, expects=SHARE, needs_all=True)
def quantile(spectrum: Spectrum, share: float) -> int | None:
    """Number of components whose running Σσ stays below this share (LyCORIS's rule)."""
    return _first_cumulative(spectrum, share, extra=0)


@rank_rule("effective", needs_all=True)
def effective(spectrum: Spectrum, _: float) -> int | None:
    """The effective rank, exp of the entropy of σ/Σσ, rounded up."""
    if not spectrum.decides_all:
        return None
    return math.ceil(spectrum.effective_rank() * (1 - 1e-12))


@rank_rule("gavish-donoho", needs_all=True)
def gavish_donoho(spectrum: Spectrum, _: float) -> int | None:
    """Every σ above the optimal hard threshold for noise of unknown level, ω(β)·median σ."""
    # Gavish and Donoho 2014, eq. 5: ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43
    if not spectrum.is_complete:
        return None
    beta = min(spectrum.shape) / max(spectrum.shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int((spectrum.values > omega * float(spectrum.values.quantile(0.5))).sum())


@rank_rule("knee", needs_all=True)
def knee(spectrum: Spectrum, _: float) -> int | None:
    """Where the curve of σ bends: the point farthest below the chord from first to last σ."""
    # Satopää et al. 2011 (Kneedle) with no smoothing: both axes scaled to [0, 1]
    if not spectrum.decides_all:
        return None
    values = spectrum.values
    if len(values) < 3 or float(values[0]) == float(values[-1]):
        return len(values)
    height = (values - values[-1]) / (values[0] - values[-1])
    position = values.new_tensor(range(len(values))) / (len(values) - 1)
    return int((1 - position - height).argmax()) + 1


def _first_cumulative(spectrum: Spectrum, share: float, extra: int) -> int | None:
    if not spectrum.decides_all:
        return None
    running = spectrum.values.cumsum(0)
    below = int((running < share * running[-1] * (1 - 1e-12)).sum())
    return max(1, min(below + extra, len(spectrum.values)))
