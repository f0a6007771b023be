"""A checkpoint as ``loratool inspect`` shows it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratool.cli.inspect_cost import show_costs
from loratool.cli.inspect_values import show_values
from loratool.cli.output import Output, fitting, span, spark
from loratool.cli.spectra import SHARES, known_ranks
from loratool.cli.tables import Sorts, in_order
from loratool.layouts.families import family_of, natural
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.ops.inspect import CheckpointReport
    from loratool.ops.inspect_checkpoint import KindRow
    from loratool.ops.inspect_weights import WeightRow

SORTS: Sorts[KindRow] = {
    "size": lambda row: -row.nbytes,
    "parameters": lambda row: -row.parameters,
    "name": lambda row: natural(row.kind),
}
_TENSOR_SORTS: Sorts[dict[str, Any]] = {
    "name": lambda row: natural(row["name"]),
    "size": lambda row: -row["bytes"],
    "parameters": lambda row: -math.prod(row["shape"]),
}
_WEIGHT_SORTS: Sorts[tuple[str, list[WeightRow]]] = {
    "name": lambda line: natural(line[0]),
    "size": lambda line: -sum(math.prod(row.shape) for row in line[1]),
    "parameters": lambda line: -sum(math.prod(row.shape) for row in line[1]),
}


def show_checkpoint(out: Output, report: CheckpointReport, sort: str | None = None) -> None:
    from loratool.ops.inspect_level import Level

    out.table(
        f"checkpoint {report.name}"
        + (f" ({report.architecture})" if report.architecture else "")
        + f", {counted(report.files, 'file')}",
        ["kind", "dtype", "tensors", "parameters", "size"],
        [
            [
                row.kind,
                ", ".join(row.dtypes),
                str(row.tensors),
                f"{row.parameters:,}",
                size_text(row.nbytes),
            ]
            for row in in_order(report.kinds, sort, SORTS)
        ],
        text=2,
    )
    if out.verbose:
        out.table(
            "tensors",
            ["tensor", "kind", "dtype", "shape"],
            [
                [row["name"], row["kind"], row["dtype"], "×".join(map(str, row["shape"]))]
                for row in in_order(report.tensors, sort, _TENSOR_SORTS)
            ],
            text=3,
        )
    what = "values as stored" if report.quantised else "parameters"
    out.line(f"{report.parameters:,} {what}, {size_text(report.nbytes)}")
    if report.tied:
        out.line(f"tied: {report.tied}")
    if report.quantised:
        out.line(f"quantised: {report.quantised}")
    if report.weights:
        _show_weights(out, report.weights, sort)
    elif report.level is Level.SPECTRA:
        out.line("no weight matrix among them that has a spectrum")
    if report.costs is not None:
        show_costs(out, report.costs)
    if report.values:
        show_values(out, report.values, report.equal)


_ORDER = (
    *("module", "tensors", "‖W‖", "σ₁", "spectrum", "90 %", "95 %", "99 %"),
    *("stable", "effective", "particip."),
)
_BY_WORTH = (
    "σ₁",
    "stable",
    "spectrum",
    "tensors",
    "90 %",
    "99 %",
    "effective",
    "95 %",
    "particip.",
)
_BARS = 16


def _show_weights(out: Output, weights: Sequence[WeightRow], sort: str | None) -> None:
    families: dict[str, list[WeightRow]] = defaultdict(list)
    for row in weights:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    lines = []
    for name, rows in in_order(list(families.items()), sort, _WEIGHT_SORTS):
        spectra = [row.spectrum for row in rows]
        complete = [spectrum for spectrum in spectra if spectrum.is_complete]
        strongest = max(spectra, key=lambda spectrum: spectrum.total_energy)
        most = max(len(spectrum.values) for spectrum in spectra)
        lines.append(
            {
                "module": name.removesuffix(".weight"),
                "tensors": str(len(rows)),
                "‖W‖": span([spectrum.norm for spectrum in spectra]),
                "σ₁": span([row.spectral_norm for row in rows]),
                "spectrum": spark(strongest.values[:_BARS].tolist()),
                **{
                    f"{100 * share:.0f} %": known_ranks([row.rank_for(share) for row in rows], most)
                    for share in SHARES
                },
                "stable": span([spectrum.stable_rank() for spectrum in spectra]),
                "effective": span([s.effective_rank() for s in complete]) or "?",
                "particip.": span([s.participation_ratio() for s in complete]) or "?",
            }
        )
    columns = fitting(out.width, lines, _ORDER, ("module", "‖W‖"), _BY_WORTH)
    out.table(
        "spectra of the weights",
        columns,
        [[line.get(column, "") for column in columns] for line in lines],
    )
    for column, text in _LEGEND.items():
        if column in columns:
            out.line(text)


_LEGEND = {
    "spectrum": "spectrum: of the matrix with the largest norm, largest singular value first",
    "90 %": "90 %, 95 %, 99 %: the rank that keeps this share of ‖W‖²; > and ?: beyond the values "
    "resolved, --exact resolves all",
    "stable": "stable, effective, particip.: three counts of the directions that matter",
}
