"""Adapters measured against each other, as a page."""

from __future__ import annotations

from loratool.layouts.families import family_of, layer_of
from loratool.ops.compare_report import CompareReport, ModuleRow, PairRow
from loratool.plural import counted
from loratool.report.page import (
    Column,
    Curve,
    CurveKind,
    Group,
    NameList,
    Page,
    Row,
    SmallTable,
    Unit,
    letter,
)
from loratool.report.text import number, percent

_COLUMNS = (
    Column("cosine", "cosine", Unit.SIGNED, "⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖‖ΔW₂‖)", mapped=True),
    Column("norm_ratio", "norm ratio", Unit.NUMBER, "‖ΔW₂‖ / ‖ΔW₁‖", mapped=True),
    Column("phi_left", "φ left", Unit.NUMBER, "overlap of the column spaces, 0 to 1", mapped=True),
    Column("phi_right", "φ right", Unit.NUMBER, "overlap of the row spaces, 0 to 1", mapped=True),
    Column(
        "first_in_second",
        "first in second",
        Unit.SHARE,
        "energy of the first in there",
        mapped=True,
    ),
    Column(
        "second_in_first",
        "second in first",
        Unit.SHARE,
        "energy of the second in there",
        mapped=True,
    ),
    Column("sign_agreement", "signs agree", Unit.SHARE, "of entries nonzero in both", mapped=True),
    Column("a_cosine", "cosine of A", Unit.SIGNED, "of the A factors, where shapes agree", True),
    Column("joint_rank", "joint rank", Unit.COUNT, "keeps 99 % of the energy of all's sum", True),
    Column("shape", "shape", Unit.TEXT),
)


def compare_page(report: CompareReport) -> Page:
    """A row per pair of adapters and module that both have."""
    names = [adapter.name for adapter in report.adapters]
    pairs = [pair.pair for pair in report.pairs]
    several = len(pairs) > 1
    rows = tuple(
        _row(module, found, group if several else 0)
        for group, pair in enumerate(pairs)
        for module in report.shared
        if (found := module.pair(pair)) is not None
    )
    advice = report.advice
    return Page(
        kind="Adapters measured against each other",
        title=" · ".join(names) if len(names) < 5 else f"{counted(len(names), 'adapter')}",
        facts=(
            ("adapters", str(len(names))),
            ("modules in two or more", f"{len(report.shared):,}"),
        ),
        columns=_COLUMNS,
        rows=rows,
        statements=(
            f"suggested: combine --method {' '.join([advice.method, advice.options]).strip()}, "
            f"because {advice.why}",
        )
        if advice
        else (),
        notes=report.notes,
        groups=tuple(
            Group(_letters(pair), f"{names[pair[0]]} · {names[pair[1]]}") for pair in pairs
        )
        if several
        else (),
        group_word="pair",
        curves=CurveKind("Principal angles", "degrees", "angle", most=90)
        if any(row.curves for row in rows)
        else None,
        tables=(_adapters(report), _pairs(report), *_grids(report)),
        lists=tuple(
            NameList(f"Only in {letter(position)}", adapter.alone)
            for position, adapter in enumerate(report.adapters)
            if adapter.alone
        ),
    )


def _letters(pair: tuple[int, int]) -> str:
    return " ".join(map(letter, pair))


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _adapters(report: CompareReport) -> SmallTable:
    return SmallTable(
        "Adapters, and what is left of each in the sum of all",
        ("", "adapter", "format", "modules", "‖ΔW‖", "survives sum", "survives TIES"),
        tuple(
            (
                letter(position),
                adapter.name,
                adapter.format,
                f"{adapter.modules:,}",
                number(adapter.norm),
                percent(report.linear[position]),
                percent(report.ties(position)),
            )
            for position, adapter in enumerate(report.adapters)
        ),
        text=(0, 1, 2),
    )


def _pairs(report: CompareReport) -> SmallTable:
    return SmallTable(
        "Pairs, over all modules; by chance: what unrelated subspaces would show",
        (
            *("", "modules", "cosine", "φ left", "by chance", "φ right", "by chance"),
            *("first in second", "second in first", "signs agree", "initial A"),
        ),
        tuple(
            (
                _letters(pair.pair),
                f"{pair.shared:,}",
                _number(pair.cosine),
                _number(pair.phi_left_whole),
                _number(pair.phi_left_chance),
                _number(pair.phi_right_whole),
                _number(pair.phi_right_chance),
                percent(pair.common[0]),
                percent(pair.common[1]),
                percent(pair.sign_agreement),
                str(pair.start.start) if pair.start else "not compared",
            )
            for pair in report.pairs
        ),
        text=(0, 10),
    )


def _grids(report: CompareReport) -> tuple[SmallTable, ...]:
    """φ(i, j) of two adapters; of more there would be three tables for each pair."""
    if len(report.pairs) > 1:
        return ()
    (pair,) = report.pairs
    first, second = map(letter, pair.pair)
    kinds = (
        ("left singular vectors", pair.phi_left),
        ("right singular vectors", pair.phi_right),
        ("factors A", pair.phi_a),
    )
    return tuple(
        SmallTable(
            f"φ(i, j) of the first i and j {what}, mean over modules",
            ("", *(f"{second} {j}" for j in grid.j)),
            tuple(
                (f"{first} {i}", *("" if v is None else f"{v:.3f}" for v in values))
                for i, values in zip(grid.i, grid.values, strict=True)
            ),
        )
        for what, grid in kinds
        if grid.i
    )


def _row(module: ModuleRow, found: PairRow, group: int) -> Row:
    cells = {
        "cosine": found.cosine,
        "norm_ratio": found.norm_ratio,
        "phi_left": found.phi_left.whole,
        "phi_right": found.phi_right.whole,
        "first_in_second": found.common[0],
        "second_in_first": found.common[1],
        "sign_agreement": found.sign_agreement,
        "a_cosine": found.start_cosine,
        "joint_rank": module.joint.rank_for,
        "shape": "×".join(map(str, module.shape)),
    }
    curves = tuple(
        Curve(values, label)
        for values, label in (
            (found.angles_left, "column spaces"),
            (found.angles_right, "row spaces"),
        )
        if values
    )
    return Row(module.name, family_of(module.name), layer_of(module.name), cells, curves, group)
