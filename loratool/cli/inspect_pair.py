"""A pair of checkpoints as ``loratool inspect`` shows it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from loratool.cli.output import Output, percent, span, spark

if TYPE_CHECKING:
    from loratool.algebra.spectrum import Spectrum
    from loratool.ops.inspect import PairReport
    from loratool.ops.inspect_pair import DeltaRow

_BARS = 16


def show_pair(out: Output, report: PairReport) -> None:
    from loratool.layouts.families import family_of, layer_of

    if not report.rows:
        out.line(f"{report.base} and {report.tuned} hold the same values")
        return
    families: dict[str, list[DeltaRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    top = max((row.relative_change or 0.0 for row in report.rows), default=0.0)
    ordered = sorted(families.items(), key=lambda item: -sum(r.delta_norm**2 for r in item[1]))
    cells = []
    for name, rows in ordered:
        rows = sorted(rows, key=lambda row: layer_of(row.name) or 0)
        energy = sum(row.delta_norm**2 for row in rows)
        base = sum(row.base_norm**2 for row in rows)
        spectra = [row.spectrum for row in rows if row.spectrum is not None]
        resolved = max(spectra, key=lambda s: s.total_energy) if spectra else None
        cells.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                percent(energy / report.energy),
                percent((energy / base) ** 0.5) if base else "from 0",
                spark([row.relative_change or 0.0 for row in rows], top) if len(rows) > 1 else "",
                spark(resolved.values[:_BARS].tolist()) if resolved else "",
                *(_energy_at(spectra, rank) for rank in (1, 4, 16)),
                _lora_answer([row for row in rows if row.spectrum is not None]),
            ]
        )
    out.table(
        f"from {report.base} to {report.tuned}, computed on {report.device}",
        [
            "module",
            "tensors",
            "energy",
            "change",
            "by layer",
            "spectrum",
            "r=1",
            "r=4",
            "r=16",
            "LoRA",
        ],
        cells,
    )
    out.line("energy: share of the whole change ‖W − W0‖²; change: ‖W − W0‖ / ‖W0‖")
    out.line("spectrum: of the matrix that changed most; r=k: energy that rank k would keep")
    out.line("LoRA: the rank of the LoRA that explains the change to within rounding")
    if report.unchanged:
        out.line(f"unchanged: {len(report.unchanged)} tensors")
    if summary := report.lora_summary():
        out.line(summary)
    out.notes(report.notes)


def _lora_answer(rows: list[DeltaRow]) -> str:
    """``r=8``, a range of ranks, no, ``?`` where it cannot be told; parts of a row by slashes."""
    ranks = [row.lora_rank for row in rows if row.lora_rank is not None]
    answers = [f"r={span(ranks)}"] if ranks else []
    if any(row.lora_tail is not None and row.lora_rank is None for row in rows):
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
