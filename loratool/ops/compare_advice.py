"""Which way of combining the measurements speak for. The rules are listed in docs/compare.md.

Each looks at the pair of adapters that it is about, and names a registered method; the first that
holds decides. They are rules of thumb: only the task's own score decides.
"""

from __future__ import annotations

from loratool.combining.registry import METHODS
from loratool.ops.compare_report import Advice, CompareReport, PairTotals

ALIKE = 0.9
"""Cosine of the whole adapters from which on they are one adapter, twice."""

OPPOSED = -0.1
"""Cosine below which they undo a part of each other."""

REPEATING = 0.05
"""Cosine from which on a sum repeats what they share."""

CROWDED = 0.25
"""Share of energy inside the other's spaces from which on they meet without agreeing."""


def advise(report: CompareReport) -> Advice | None:
    """The first rule that holds; None where no two adapters share a module."""
    pairs = [pair for pair in report.pairs if pair.shared and pair.cosine is not None]
    if not pairs:
        return None
    advice = next(found for rule in RULES if (found := rule(report, pairs)) is not None)
    assert advice.method in METHODS
    return advice


def _alike(report: CompareReport, pairs: list[PairTotals]) -> Advice | None:
    least = min(pairs, key=_cosine)
    if _cosine(least) < ALIKE or len(pairs) < len(report.pairs):
        return None
    return Advice(
        "linear",
        "",
        f"the updates point the same way (cosine {_cosine(least):.2f} or more); "
        "a mean keeps their size, a sum would multiply it",
    )


def _opposed(report: CompareReport, pairs: list[PairTotals]) -> Advice | None:
    worst = min(pairs, key=_cosine)
    if _cosine(worst) > OPPOSED:
        return None
    kept = min(value for value in report.linear if value is not None)
    return Advice(
        "ties",
        "",
        f"{_names(report, worst)} point against each other (cosine {_cosine(worst):.2f}), a sum "
        f"keeps {100 * kept:.0f} % of one adapter; TIES lets one side win each element",
    )


def _repeating(report: CompareReport, pairs: list[PairTotals]) -> Advice | None:
    most = max(pairs, key=_cosine)
    if _cosine(most) < REPEATING:
        return None
    return Advice(
        "pico",
        "",
        f"{_names(report, most)} share a part of what they do (cosine {_cosine(most):.2f}), "
        "which a sum repeats; Pico weakens the shared directions and keeps the adapters' mean size",
    )


def _crowded(report: CompareReport, pairs: list[PairTotals]) -> Advice | None:
    most = max(pairs, key=_common)
    if _common(most) < CROWDED:
        return None
    return Advice(
        "tsv_m",
        "",
        f"{_names(report, most)} use the same directions ({100 * _common(most):.0f} % of the "
        f"energy) for different things (cosine {_cosine(most):.2f}); TSV-M sets them apart",
    )


def _apart(report: CompareReport, pairs: list[PairTotals]) -> Advice | None:
    rank = max(row.joint.rank_for for row in report.shared)
    return Advice(
        "svd",
        "--rank energy:0.99",
        f"the updates hardly meet (cosines up to {max(abs(_cosine(pair)) for pair in pairs):.2f}); "
        f"their sum keeps all of them, and 99 % of it fits into ranks up to {rank}",
    )


RULES = (_alike, _opposed, _repeating, _crowded, _apart)


def _cosine(pair: PairTotals) -> float:
    return pair.cosine or 0.0


def _common(pair: PairTotals) -> float:
    """The smaller of the two shares: both must lie in the other's spaces."""
    return min(share or 0.0 for share in pair.common)


def _names(report: CompareReport, pair: PairTotals) -> str:
    return " and ".join(report.adapters[position].name for position in pair.pair)
