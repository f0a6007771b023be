"""``loratool compare``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, spark
from loratool.cli.pictures import Pictures, picture_options
from loratool.layouts.families import by_name, family_of, layer_of, natural
from loratool.plural import counted
from loratool.report.page import letter
from loratool.report.text import percent

if TYPE_CHECKING:
    from loratool.ops.compare_report import CompareReport, ModuleRow, PairTotals, PhiGrid


@click.command("compare")
@click.argument("adapters", type=options.PATH, nargs=-1, required=True)
@options.alpha_option
@options.include_option
@options.exclude_option
@click.option(
    "--sample",
    type=click.IntRange(min=1, max=2**26),
    default=2**20,
    show_default=True,
    metavar="N",
    help="Entries of each module that figures on signs are taken from, in whole rows.",
)
@options.jobs_option
@picture_options
@options.report_option
@options.framed
def compare_command(
    out: Output,
    adapters: tuple[Path, ...],
    alpha: float | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    sample: int,
    jobs: int | None,
    pictures: Pictures,
    report: Path | None,
) -> None:
    """Measure two or more ADAPTERS of one model against each other.

    Per module: how alike the updates are (cosine, subspaces, signs), whether they were trained from
    the same initial A, and how much of each would survive being combined. No base is needed.

    \b
    Example:
      loratool compare adapter-a/ adapter-b/
      loratool compare seed-*/ --include q_proj -v
    """
    from loratool.api.look import compare

    pictures.check()
    result = compare(
        adapters,
        alpha=alpha,
        include=include,
        exclude=exclude,
        sample=sample,
        jobs=jobs,
        progress=out.progress(),
    )
    out.report_file(report, result.to_json())
    pictures.write(result)
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result, adapters)
    pictures.show(out)


def _show(out: Output, result: CompareReport, adapters: Sequence[Path]) -> None:
    _show_adapters(out, result)
    if len(result.adapters) > 2:
        _show_matrix(out, result)
        _show_pairs(out, result)
    for pair in result.pairs if out.verbose or len(result.pairs) == 1 else ():
        if pair.shared:
            _show_modules(out, result, pair)
            _show_grids(out, pair)
    _show_legend(out, result)
    _show_starts(out, result)
    _show_alone(out, result)
    _show_advice(out, result, adapters)
    out.notes(result.notes)


def _letters(pair: tuple[int, int]) -> str:
    return " ".join(map(letter, pair))


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _show_adapters(out: Output, report: CompareReport) -> None:
    rows = []
    for position, adapter in enumerate(report.adapters):
        ranks = [row.ranks[row.adapters.index(position)] for row in _of(report.rows, position)]
        rows.append(
            [
                letter(position),
                adapter.name,
                adapter.format,
                str(adapter.modules),
                _span(ranks) if ranks else "",
                f"{adapter.norm:.3g}",
                percent(report.linear[position]),
                percent(report.ties(position)),
            ]
        )
    columns = ["", "adapter", "format", "modules", "rank", "‖ΔW‖", "survives sum", "survives TIES"]
    out.table("adapters", columns, rows, text=3)


def _of(rows: Sequence[ModuleRow], position: int) -> list[ModuleRow]:
    return [row for row in rows if position in row.adapters]


def _show_matrix(out: Output, report: CompareReport) -> None:
    cosines = {pair.pair: pair.cosine for pair in report.pairs}
    count = len(report.adapters)
    rows = []
    for i in range(count):
        own = 1.0 if report.adapters[i].norm else None
        values = [own if i == j else cosines[min(i, j), max(i, j)] for j in range(count)]
        cells = ("" if v is None else f"{_number(v, 2)} {spark([abs(v)], 1.0)}" for v in values)
        rows.append([letter(i), *cells])
    out.table("cosine of the updates", ["", *map(letter, range(count))], rows)


def _show_pairs(out: Output, report: CompareReport) -> None:
    rows = [
        [
            _letters(pair.pair),
            str(pair.shared),
            _number(pair.cosine),
            _against(pair.phi_left_whole, pair.phi_left_chance),
            _against(pair.phi_right_whole, pair.phi_right_chance),
            " / ".join(percent(share) for share in pair.common) if any(pair.common) else "",
            percent(pair.sign_agreement),
            str(pair.start.start) if pair.start else "",
        ]
        for pair in report.pairs
    ]
    columns = [
        "",
        "modules",
        "cosine",
        "φ left",
        "φ right",
        "in common",
        "signs agree",
        "initial A",
    ]
    out.table("pairs", columns, rows)


def _against(value: float | None, chance: float | None) -> str:
    return "" if value is None else f"{value:.3f} ({chance:.3f})"


def _show_modules(out: Output, report: CompareReport, pair: PairTotals) -> None:
    families: dict[str, list[ModuleRow]] = defaultdict(list)
    for row in by_name(report.shared):
        if row.pair(pair.pair):
            families[row.name if out.verbose else family_of(row.name)].append(row)
    cells = []
    for name, rows in families.items():
        rows = sorted(rows, key=lambda row: layer_of(row.name) or 0)
        found = [measured for row in rows if (measured := row.pair(pair.pair))]
        cosines = [measured.cosine for measured in found]
        cells.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                _mean(cosines),
                spark([abs(cosine or 0.0) for cosine in cosines], 1.0) if len(rows) > 1 else "",
                _mean([measured.norm_ratio for measured in found]),
                _mean([measured.phi_left.whole for measured in found]),
                _mean([measured.phi_right.whole for measured in found]),
                _mean([measured.common[0] for measured in found]),
                _mean([measured.sign_agreement for measured in found]),
                f"{_span(row.joint.rank_for for row in rows)} of "
                f"{_span(sum(row.numerical_ranks) for row in rows)}",
            ]
        )
    columns = ["module", "modules", "cosine", "by layer", "‖B‖/‖A‖", "φ left", "φ right"]
    first, second = map(letter, pair.pair)
    columns[4] = f"‖{second}‖/‖{first}‖"
    columns += [f"{first} in {second}", "signs agree", "joint rank"]
    out.table(f"{counted(pair.shared, 'module')} in both {first} and {second}", columns, cells)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known)) if known else ""


def _show_grids(out: Output, pair: PairTotals) -> None:
    for title, grid in (
        ("φ(i, j) left", pair.phi_left),
        ("φ(i, j) right", pair.phi_right),
        ("φ(i, j) of A", pair.phi_a),
    ):
        if grid.i:  # updates of zero have no directions
            _show_grid(out, title, pair, grid)


def _show_grid(out: Output, title: str, pair: PairTotals, grid: PhiGrid) -> None:
    first, second = map(letter, pair.pair)
    rows = [
        [f"{first} {i}", *("" if v is None else f"{v:.2f} {spark([v], 1.0)}" for v in row)]
        for i, row in zip(grid.i, grid.values, strict=True)
    ]
    out.table(title, ["", *(f"{second} {j}" for j in grid.j)], rows)


def _show_legend(out: Output, report: CompareReport) -> None:
    from loratool.ops.compare import JOINT_SHARE, TIES_DENSITY

    out.line(
        "survives: share of an update left in the plain sum of all; and, of modules that two or "
        f"more have, after TIES trims each to its largest {100 * TIES_DENSITY:.0f} % of entries "
        "and elects signs; all weights 1"
    )
    out.line(
        "φ(i, j): overlap of the first i and j singular vectors of ΔW, or of the factor A, from 0 "
        "to 1; a mean over modules"
    )
    if len(report.pairs) == 1:
        (pair,) = report.pairs
        left, right = _number(pair.phi_left_chance), _number(pair.phi_right_chance)
        out.line(f"φ of unrelated subspaces of these ranks: {left} left, {right} right")
        out.line(
            f"joint rank: keeps {100 * JOINT_SHARE:.0f} % of the sum's energy; "
            "of: all ranks together"
        )
    else:
        out.line("in brackets: φ of unrelated subspaces of these ranks")
    sampled = [row for row in report.shared if row.is_sampled]
    if sampled:
        looked_at = sum(row.entries for row in sampled)
        total = sum(row.shape[0] * row.shape[1] for row in sampled)
        out.line(
            f"signs and TIES: from random rows of {counted(len(sampled), 'module')}, {looked_at:,} "
            f"of {total:,} entries; --sample takes more"
        )


_STARTS = {
    "shared": "share their initial A: trained from one seed, or one from the other",
    "independent": "started from different A",
    "undecided": "cannot be told to share their initial A or not",
    "orthogonalised": "hold A factors from a decomposition, which say nothing of their start",
}


def _show_starts(out: Output, report: CompareReport) -> None:
    for pair in report.pairs:
        start = pair.start
        if start is None:
            if pair.shared:
                out.line(f"{_letters(pair.pair)}: initial A not compared, their ranks differ")
            continue
        out.line(
            f"{_letters(pair.pair)}: {_STARTS[str(start.start)]} (cosine of the A factors "
            f"{start.cosine:.3f}, distance {start.distance:.2f}; {start.positive} of {start.rows} "
            f"rows point the same way, probability by chance {max(start.chance, 1e-300):.1g})"
        )


def _show_advice(out: Output, report: CompareReport, adapters: Sequence[Path]) -> None:
    advice = report.advice
    if advice is not None:
        known = zip(adapters, report.adapters, strict=True)
        paths = [str(path) for path, adapter in known if adapter.modules]
        words = ["loratool combine", *paths, "--method", advice.method, advice.options]
        out.line(f"suggested: {' '.join(word for word in words if word)} -o OUT")
        out.line(f"because {advice.why}")


def _show_alone(out: Output, report: CompareReport) -> None:
    for position, adapter in enumerate(report.adapters):
        if not adapter.alone:
            continue
        alone = adapter.alone if out.verbose else {family_of(name) for name in adapter.alone}
        names = sorted(alone, key=natural)
        shown = ", ".join(name.removesuffix(".weight") for name in names[:8])
        more = f", … {len(names) - 8} more" if len(names) > 8 else ""
        out.line(
            f"only in {letter(position)}: {counted(len(adapter.alone), 'module')}: {shown}{more}"
        )
