"""A checkpoint as ``loratool inspect`` shows it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratool.cli.inspect_cost import show_costs
from loratool.cli.inspect_values import show_values
from loratool.cli.output import Output, counted, size_text
from loratool.cli.tables import Sorts, in_order

if TYPE_CHECKING:
    from loratool.ops.inspect import CheckpointReport
    from loratool.ops.inspect_checkpoint import KindRow

SORTS: Sorts[KindRow] = {
    "size": lambda row: -row.nbytes,
    "parameters": lambda row: -row.parameters,
    "name": lambda row: row.kind,
}
_TENSOR_SORTS: Sorts[dict[str, Any]] = {
    "model": lambda row: 0,
    "size": lambda row: -row["bytes"],
    "parameters": lambda row: -math.prod(row["shape"]),
    "name": lambda row: row["name"],
}


def show_checkpoint(out: Output, report: CheckpointReport, sort: str | None = None) -> None:
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
    out.line(f"{report.parameters:,} parameters, {size_text(report.nbytes)}")
    if report.tied:
        out.line(f"tied: {report.tied}")
    if report.quantised:
        out.line(f"quantised: {report.quantised}")
    if report.costs is not None:
        show_costs(out, report.costs)
    if report.values:
        show_values(out, report.values, report.equal)
