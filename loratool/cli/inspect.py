"""``loratool inspect``."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, percent, size_text, spark

if TYPE_CHECKING:
    from loratool.ops.inspect import (
        AdapterReport,
        CheckpointReport,
        DeltaRow,
        PairReport,
        UpdateRow,
    )

_BARS = 16


@click.command("inspect")
@click.argument("path", type=options.PATH)
@click.argument("tuned", type=options.PATH, required=False)
@options.alpha_option
@options.device_option
@options.jobs_option
@options.report_option
@options.framed
def inspect_command(
    out: Output,
    path: Path,
    tuned: Path | None,
    alpha: float | None,
    device: str,
    jobs: int | None,
    report: Path | None,
) -> None:
    """Look inside PATH, a checkpoint or an adapter; with TUNED, at what fine-tuning changed.

    \b
    Example:
      loratool inspect model/
      loratool inspect adapter/
      loratool inspect base/ tuned/
    """
    from loratool.api import inspect
    from loratool.ops.inspect import AdapterReport, CheckpointReport

    result = inspect(path, tuned, alpha=alpha, device=device, jobs=jobs, progress=out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    elif isinstance(result, CheckpointReport):
        _show_checkpoint(out, result)
    elif isinstance(result, AdapterReport):
        _show_adapter(out, result)
    else:
        _show_pair(out, result)


def _show_checkpoint(out: Output, report: CheckpointReport) -> None:
    out.table(
        f"checkpoint {report.name}"
        + (f" ({report.architecture})" if report.architecture else "")
        + f", {report.files} file{'s' if report.files > 1 else ''}",
        ["kind", "dtype", "tensors", "parameters", "size"],
        [
            [
                row.kind,
                ", ".join(row.dtypes),
                str(row.tensors),
                f"{row.parameters:,}",
                size_text(row.nbytes),
            ]
            for row in report.kinds
        ],
        text=2,
    )
    if out.verbose:
        out.table(
            "tensors",
            ["tensor", "kind", "dtype", "shape"],
            [
                [row["name"], row["kind"], row["dtype"], "×".join(map(str, row["shape"]))]
                for row in report.tensors
            ],
            text=3,
        )
    out.line(f"{report.parameters:,} parameters, {size_text(report.nbytes)}")
    if report.tied:
        out.line(f"tied: {report.tied}")


def _show_adapter(out: Output, report: AdapterReport) -> None:
    from loratool.ops.inspect import family_of

    families: dict[str, list[UpdateRow]] = defaultdict(list)
    for row in report.rows:
        families[family_of(row.name)].append(row)
    cells = []
    groups = [[row] for row in report.rows] if out.verbose else list(families.values())
    for rows in groups:
        name = rows[0].name if out.verbose else family_of(rows[0].name)
        strongest = max(rows, key=lambda row: row.norm)
        cells.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                _span([row.rank for row in rows]),
                _span([row.alpha for row in rows]),
                _span([row.scale for row in rows]),
                _span([row.norm for row in rows]),
                f"{strongest.stable_rank:.1f}",
                spark(strongest.values[:_BARS]),
            ]
        )
    title = f"adapter {report.name} ({report.format}), base: {report.base_model or 'not recorded'}"
    if cells:
        columns = ["module", "tensors", "rank", "alpha", "scale", "‖ΔW‖", "stable rank", "spectrum"]
        out.table(title, columns, cells)
    else:
        out.line(title)
    for other in report.others[:12]:
        out.line(f"{other['name']}: {other['update']}")
    if len(report.others) > 12:
        out.line(f"… {len(report.others) - 12} more updates that are not low-rank")
    if report.replaced:
        names = ", ".join(row["name"] for row in report.replaced[:4])
        more = len(report.replaced) - 4
        out.line(
            f"replaces {len(report.replaced)} parameters whole: {names}"
            + (f", … {more} more" if more > 0 else "")
        )
    out.line(f"{report.parameters:,} values, {size_text(report.nbytes)}")
    if cells:
        out.line("spectrum: singular values of the strongest update of each row, largest first")


def _show_pair(out: Output, report: PairReport) -> None:
    from loratool.ops.inspect import family_of, layer_of

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
    answers = [f"r={_span(ranks)}"] if ranks else []
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


def _span(values: list[float] | list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}"


if TYPE_CHECKING:
    from loratool.algebra.spectrum import Spectrum
