"""``loratool estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.plural import counted
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.estimate import EstimateReport


@click.command("estimate")
@click.argument("model")
@click.option("--rank", type=int, default=8, show_default=True, help="Rank of the adapter.")
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    metavar="attention|mlp|all-linear|q,v|REGEX",
    help="Which matrices get an adapter.",
)
@options.report_option
@options.framed
def estimate_command(out: Output, model: str, rank: int, targets: str, report: Path | None) -> None:
    """What a LoRA of MODEL costs to train, store, merge and extract.

    MODEL is a checkpoint, a config.json or its folder, or a model of the LoRA paper by name:
    roberta-base, roberta-large, deberta-xxl, gpt2-medium, gpt2-large, gpt3-175b. Only headers or
    the config are read.

    \b
    Example:
      loratool estimate model/ --rank 16
      loratool estimate gpt3-175b --rank 4 --targets query,value
    """
    from loratool.ops.estimate import estimate

    result = estimate(model, rank=rank, targets=targets)
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result)


def _show(out: Output, report: EstimateReport) -> None:
    kind = f" ({report.model_type})" if report.model_type else ""
    parameters = counted(report.parameters, "parameter")
    out.line(f"{report.model}{kind}: {parameters}, {size_text(report.model_bytes)}")
    out.table(
        f"LoRA of rank {report.rank} on {report.targets}",
        ["module", "matrices", "shape", "rank", "parameters"],
        [
            [
                row.name,
                str(row.matrices),
                "×".join(map(str, row.shape)),
                str(row.rank),
                f"{row.parameters:,}",
            ]
            for row in report.rows
        ],
    )
    share = report.trained / report.parameters
    out.line(f"trained: {counted(report.trained, 'parameter')}, {percent(share)} of the model's")
    sizes = report.adapter_bytes
    out.line(
        f"adapter: {size_text(sizes['float16'])} in 16 bits, {size_text(sizes['float32'])} in 32; "
        f"the model is {report.model_bytes / sizes['float16']:,.0f} times as large"
    )
    out.table(
        "training memory",
        ["", "weights", "gradients", "Adam", "together"],
        [
            [name, *(size_text(part) for part in (m.weights, m.gradients, m.optimizer, m.total))]
            for name, m in (
                ("full fine-tuning", report.full_training),
                ("LoRA", report.lora_training),
            )
        ],
    )
    out.line(
        f"merge: reads {size_text(report.model_bytes + sizes['float16'])}, writes "
        f"{size_text(report.model_bytes)}, {_flops(report.merge_flops)}"
    )
    out.line(
        f"extract: reads {size_text(2 * report.model_bytes)}; largest change in float32 "
        f"{size_text(report.largest_matrix_bytes)}; full SVDs would take "
        f"{_flops(report.svd_flops)}"
    )
    body = report.to_json()
    out.notes([*report.notes, *(f"assumed: {text}" for text in body["assumptions"])])


def _flops(count: int) -> str:
    value = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}flop"
        value /= 1000
    return f"{value:,.3g} Pflop"
