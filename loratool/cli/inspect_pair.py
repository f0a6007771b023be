"""A pair of checkpoints as ``loratool inspect`` shows it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from loratool.cli.heatmap import show_heatmap
from loratool.cli.output import Output, fitting, span, spark
from loratool.cli.spectra import SHARES, known_ranks, show_sizes
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import natural
from loratool.plural import counted
from loratool.report.text import percent

if TYPE_CHECKING:
    from loratool.algebra.spectrum import Spectrum
    from loratool.ops.inspect import PairReport
    from loratool.ops.inspect_pair import DeltaRow

_BARS = 16
_ROWS = 40
"""Modules in the table before -v is asked for."""

SORTS: Sorts[tuple[str, list[DeltaRow]]] = {
    "energy": lambda line: -sum(row.delta_norm**2 for row in line[1]),
    "change": lambda line: -(_change(line[1]) or 0.0),
    "stable-rank": lambda line: (
        -max((row.spectrum.stable_rank() for row in line[1] if row.spectrum), default=0.0)
    ),
    "name": lambda line: natural(line[0]),
}


def show_pair(out: Output, report: PairReport, sort: str | None = None) -> None:
    from loratool.ops.findings import nothing_changed
    from loratool.ops.inspect_level import Level

    if report.level is Level.HEADERS:
        _show_headers(out, report)
        return
    if not report.rows:
        out.line(nothing_changed(report.base, report.tuned, len(report.unchanged)))
        _headers(out, report)
        out.notes(report.notes)
        return
    _summary(out, report)
    _heatmap(out, report)
    _table(out, report, sort)
    out.notes(report.notes)


def _show_headers(out: Output, report: PairReport) -> None:
    kinds = Counter(row.kind for row in report.paired)
    out.line(f"{report.base} and {report.tuned}: {counted(len(report.paired), 'tensor')} in both")
    out.line(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    _headers(out, report)
    out.notes(report.notes)


def _headers(out: Output, report: PairReport) -> None:
    """What headers say of the two: dtypes and tokens."""
    dtypes = Counter(
        (row.base_dtype, row.tuned_dtype)
        for row in report.paired
        if row.base_dtype != row.tuned_dtype
    )
    for (before, after), count in dtypes.items():
        out.line(f"{counted(count, 'tensor')} went from {before} to {after}")
    for row in report.paired:
        if row.added_rows:
            out.line(f"{row.name}: {counted(row.added_rows, 'token')} added")


def _summary(out: Output, report: PairReport) -> None:
    """What matters, in lines that fit one screen."""
    base = sum(row.base_norm**2 for row in report.rows) ** 0.5
    change = f"by {percent(report.energy**0.5 / base)} of their norm" if base else "from zero"
    changed, total = len(report.rows), len(report.rows) + len(report.unchanged)
    out.line(
        f"{report.base} → {report.tuned}: {changed} of {counted(total, 'tensor')} changed, {change}"
    )
    if summary := report.lora_summary():
        out.line(summary)
    if report.matrices:
        show_sizes(
            out,
            "matrix's change",
            report.adapter_bytes,
            lambda share: [row.rank_for(share) for row in report.matrices],
        )
    _headers(out, report)


def _heatmap(out: Output, report: PairReport) -> None:
    from loratool.layouts.families import family_of, layer_of, without_common_start

    changed: dict[str, dict[int, list[DeltaRow]]] = defaultdict(lambda: defaultdict(list))
    for row in report.rows:
        if (layer := layer_of(row.name)) is not None:
            changed[family_of(row.name)][layer].append(row)
    grid: dict[str, dict[int, float]] = {name: {} for name in changed}
    for pair in report.paired:
        family, layer = family_of(pair.name), layer_of(pair.name)
        if family in grid and layer is not None:
            rows = changed[family][layer]
            change = _change(rows)
            grid[family][layer] = 0.0 if not rows else math.inf if change is None else change
    grid = {name.removesuffix(".weight"): values for name, values in grid.items()}
    layers = sorted({layer for values in grid.values() for layer in values})
    if len(layers) < 2:
        return
    short = without_common_start(grid)
    show_heatmap(
        out,
        "‖W − W0‖ / ‖W0‖ by layer",
        {short[name]: grid[name] for name in sorted(grid, key=natural)},
        layers,
    )


def _table(out: Output, report: PairReport, sort: str | None) -> None:
    from loratool.layouts.families import family_of, layer_of

    families: dict[str, list[DeltaRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    top = max((row.relative_change or 0.0 for row in report.rows), default=0.0)
    ordered = in_order(list(families.items()), sort, SORTS)
    lines = []
    for name, rows in ordered if out.verbose else ordered[:_ROWS]:
        rows = sorted(rows, key=lambda row: layer_of(row.name) or 0)
        energy = sum(row.delta_norm**2 for row in rows)
        spectra = [row.spectrum for row in rows if row.spectrum is not None]
        changed = sum(row.changed_share * _elements(row) for row in rows)
        change = _change(rows)
        line = {
            "module": name.removesuffix(".weight"),
            "tensors": str(len(rows)),
            "energy": percent(energy / report.energy) if report.energy else "",
            "change": "from 0" if change is None else percent(change),
            "entries": percent(changed / max(1, sum(_elements(row) for row in rows))),
        }
        if report.matrices:
            line |= _spectrum_cells(rows, spectra)
        elif len(rows) > 1:
            line["by layer"] = spark([row.relative_change or 0.0 for row in rows], top)
        lines.append(line)
    columns = fitting(out.width, lines, _ORDER, _ALWAYS, _BY_WORTH)
    out.table(
        f"by {sort or 'energy'}, computed on {report.device}",
        columns,
        [[line.get(column, "") for column in columns] for line in lines],
    )
    if len(lines) < len(ordered):
        out.line(f"… {counted(len(ordered) - len(lines), 'more module')}: -v shows all")
    _legend(out, columns)
    if report.unchanged:
        out.line(f"unchanged: {counted(len(report.unchanged), 'tensor')}")


_LEGEND = {
    "energy": "energy: share of the whole change ‖W − W0‖²; change: ‖W − W0‖ / ‖W0‖",
    "entries": "entries: share of the entries that differ",
    "spectrum": "spectrum: of the matrix that changed most; r=k: energy that rank k would keep",
    "stable": "stable, effective, particip.: three counts of the directions that matter",
    "noise": "noise: singular values above what rounding makes; G–D: above the optimal threshold",
    "90 %": "90 %, 95 %, 99 %: the rank that keeps this share of a matrix's change",
    "LoRA": "LoRA: the rank of the LoRA that explains the change to within rounding",
}


def _legend(out: Output, columns: list[str]) -> None:
    for column, text in _LEGEND.items():
        if column in columns:
            out.line(text)


_ALWAYS = ("module", "energy", "change")
_BY_WORTH = (
    *("LoRA", "spectrum", "90 %", "99 %", "tensors", "r=16", "stable", "r=1", "by layer"),
    *("95 %", "noise", "entries", "effective", "r=4", "particip.", "G–D"),
)
_ORDER = (
    *("module", "tensors", "energy", "change", "entries", "by layer", "spectrum"),
    *("r=1", "r=4", "r=16", "90 %", "95 %", "99 %", "stable", "effective", "particip."),
    *("noise", "G–D", "LoRA"),
)


def _spectrum_cells(rows: list[DeltaRow], spectra: list[Spectrum]) -> dict[str, str]:
    if not spectra:
        return {}
    resolved = max(spectra, key=lambda s: s.total_energy)
    complete = [s for s in spectra if s.is_complete]
    matrices = [row for row in rows if row.spectrum is not None]
    return {
        "spectrum": spark(resolved.values[:_BARS].tolist()),
        **{f"r={rank}": _energy_at(spectra, rank) for rank in (1, 4, 16)},
        **{f"{100 * share:.0f} %": _rank_for(matrices, share) for share in SHARES},
        "stable": span([s.stable_rank() for s in spectra]),
        "effective": span([s.effective_rank() for s in complete]) or "?",
        "particip.": span([s.participation_ratio() for s in complete]) or "?",
        "noise": known_ranks([row.above_noise for row in matrices], len(resolved.values)),
        "G–D": span([rank for s in complete if (rank := _gavish_donoho(s)) is not None]) or "?",
        "LoRA": _lora_answer(matrices),
    }


def _rank_for(rows: list[DeltaRow], share: float) -> str:
    most = max(len(row.spectrum.values) for row in rows if row.spectrum is not None)
    return known_ranks([row.rank_for(share) for row in rows], most)


def _gavish_donoho(spectrum: Spectrum) -> int | None:
    from loratool.algebra.ranks import parse_rank_rule

    return parse_rank_rule("gavish-donoho")(spectrum)


def _elements(row: DeltaRow) -> int:
    total = 1
    for size in row.shape:
        total *= size
    return total


def _change(rows: list[DeltaRow]) -> float | None:
    """‖W − W0‖ / ‖W0‖ over all rows; None where the base is zero."""
    base = sum(row.base_norm**2 for row in rows)
    return float((sum(row.delta_norm**2 for row in rows) / base) ** 0.5) if base else None


def _lora_answer(rows: list[DeltaRow]) -> str:
    """``r=8``, a range of ranks, no, ``?`` where it cannot be told; parts of a row by slashes."""
    found = [row for row in rows if row.lora_rank is not None]
    ranks = [rank for row in found for rank in (row.lora_least, row.lora_rank) if rank]
    answers = [f"r={span(ranks)}"] if ranks else []
    least = [row.lora_least for row in rows if row.lora_rank is None and row.lora_least]
    answers += [f"r≥{min(least)}"] if least else []
    if any(row.lora_tail is not None and not (row.lora_rank or row.lora_least) for row in rows):
        answers.append("no")
    if any(row.lora_tail is None for row in rows):
        answers.append("?")
    return "/".join(answers)


def _energy_at(spectra: list[Spectrum], rank: int) -> str:
    total = sum(spectrum.total_energy for spectrum in spectra)
    if not total:
        return ""
    kept = sum(spectrum.energy_at(rank) * spectrum.total_energy for spectrum in spectra)
    return f"{100 * kept / total:.0f} %"
