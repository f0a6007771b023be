"""A checkpoint as ``loratool inspect`` shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratool.cli.inspect_values import show_values
from loratool.cli.output import Output, counted, size_text

if TYPE_CHECKING:
    from loratool.ops.inspect import CheckpointReport


def show_checkpoint(out: Output, report: CheckpointReport) -> None:
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
    if report.quantised:
        out.line(f"quantised: {report.quantised}")
    if report.values:
        show_values(out, report.values, report.equal)
