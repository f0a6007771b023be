"""Whether two trainings of an adapter began from the same A.

LoRA starts with a random A and B = 0, and A moves little. Common optimisers treat the two signs
of a row of A (with its column of B) alike, and so do the usual distributions of the start; so for
independent starts each ⟨row k of A₁, row k of A₂⟩ is positive or negative with probability ½, rows
independent of each other, however long both were trained. That makes the sign test exact where a
test that takes trained entries for independent would not be. It says nothing about factors that
came out of an SVD, whose signs are conventions; their rows are orthogonal, which random ones are
not. A single row cannot be orthogonal to others, so adapters of rank 1 throughout stay undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

SURE = 1e-6
"""Probability of as many positive rows by chance below which a common start is claimed."""

ALIKE = 0.5
"""Cosine of all A factors from which on they count as nearly where they started."""

UNRELATED = 0.1
"""Cosine below which nothing hints at a common start."""

_ORTHOGONAL = 0.1
"""Rows whose cosines are below this share of what random rows show were orthogonalised."""


class Start(StrEnum):
    """What can be said of the initial A of two adapters."""

    SHARED = "shared"
    INDEPENDENT = "independent"
    UNDECIDED = "undecided"
    ORTHOGONALISED = "orthogonalised"


@dataclass(frozen=True)
class RowStatistics:
    """What one pair of A factors (r, in) contributes.

    inner, first, second: ⟨A₁, A₂⟩, ‖A₁‖², ‖A₂‖². positive, rows: rows with positive and with
    nonzero inner product. skew, random_skew: of the less orthogonal factor, the mean squared
    cosine of two different rows, and its mean for random rows; 0, 0 for a single row.
    """

    inner: float
    first: float
    second: float
    positive: int
    rows: int
    skew: float
    random_skew: float

    @property
    def cosine(self) -> float | None:
        """⟨A₁, A₂⟩/(‖A₁‖‖A₂‖); None where one is zero."""
        size = math.sqrt(self.first * self.second)
        return self.inner / size if size else None


def row_statistics(first: Tensor, second: Tensor) -> RowStatistics:
    """Compare two A factors of one shape row by row, in float64."""
    one, two = first.double(), second.double()
    products = (one * two).sum(dim=1)
    rows = one.shape[0]
    return RowStatistics(
        float(products.sum()),
        float(one.square().sum()),
        float(two.square().sum()),
        int((products > 0).sum()),
        int((products != 0).sum()),
        max(_skew(one), _skew(two)),
        1 / one.shape[1] if rows > 1 else 0.0,
    )


def _skew(factor: Tensor) -> float:
    """The mean squared cosine of two different rows."""
    rows = factor.shape[0]
    if rows < 2:
        return 0.0
    sizes = factor.norm(dim=1, keepdim=True).clamp(min=1e-300)
    unit = factor / sizes
    gram = unit @ unit.T
    gram.fill_diagonal_(0.0)
    return float(gram.square().sum()) / (rows * (rows - 1))


@dataclass(frozen=True)
class StartVerdict:
    """What all A factors of two adapters say together.

    cosine: of all factors as one vector. positive of rows rows had a positive inner product;
    chance: the probability of at least as many by chance.
    """

    start: Start
    cosine: float
    positive: int
    rows: int
    chance: float

    @property
    def distance(self) -> float:
        """√(2 − 2·cosine): 0 for equal directions, √2 for unrelated ones."""
        return math.sqrt(max(0.0, 2 - 2 * self.cosine))


def judge_start(statistics: Sequence[RowStatistics]) -> StartVerdict | None:
    """The verdict over all modules with A factors of one shape; None where there are none."""
    first, second = (
        math.fsum(s.first for s in statistics),
        math.fsum(s.second for s in statistics),
    )
    rows = sum(s.rows for s in statistics)
    if not rows or not first or not second:
        return None
    cosine = math.fsum(s.inner for s in statistics) / math.sqrt(first * second)
    positive = sum(s.positive for s in statistics)
    chance = at_least(positive, rows)
    skew, random_skew = (
        math.fsum(s.skew for s in statistics),
        math.fsum(s.random_skew for s in statistics),
    )
    if random_skew and skew < _ORTHOGONAL**2 * random_skew:
        start = Start.ORTHOGONALISED
    elif chance <= SURE and cosine >= ALIKE and random_skew:
        start = Start.SHARED
    elif cosine < UNRELATED and chance > SURE:
        start = Start.INDEPENDENT
    else:
        start = Start.UNDECIDED
    return StartVerdict(start, cosine, positive, rows, chance)


def at_least(successes: int, trials: int) -> float:
    """P(X ≥ successes) for X ~ Binomial(trials, ½)."""
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        - trials * math.log(2)
        for k in range(successes, trials + 1)
    ]
    return min(1.0, math.fsum(math.exp(log) for log in logs))
