"""``loratool init``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.inits.registry import INITS
from loratool.layouts.families import by_name
from loratool.plural import counted
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.init import InitPlan, InitReport


def _names(changing_base: bool) -> str:
    names = [name for name, init in INITS.items() if init.changes_base is changing_base]
    return ", ".join(names)


@click.command("init")
@click.argument("base", type=options.PATH)
@options.output_option
@click.option("--rank", type=int, default=8, show_default=True, help="Rank of the adapter.")
@click.option("--alpha", type=options.FINITE, help="LoRA alpha (default: the rank, scale 1).")
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    metavar="attention|mlp|all-linear|q,v|REGEX",
    help="Which modules get an adapter.",
)
@click.option(
    "--method",
    default="kaiming",
    show_default=True,
    metavar="NAME",
    help=f"How A and B start: with B = 0 ({_names(False)}), or from the weights ({_names(True)}).",
)
@click.option(
    "--residual",
    type=options.PATH,
    metavar="DIR",
    help="Where the base without the adapter's start goes, for methods that use the weights.",
)
@click.option(
    "--dtype", metavar="float32|float16|bfloat16", help="Of the factors (default: float32)."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random factors.")
@click.option(
    "--format",
    "format_name",
    default="peft",
    show_default=True,
    metavar="peft|loralib",
    help="peft: a folder for PeftModel. loralib: the LoRA authors' layout, which can adapt q and v "
    "of a fused q, k, v matrix (GPT-2) alone.",
)
@click.option("--base-model", metavar="OWNER/NAME", help="The base's name on the Hub.")
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def init_command(
    out: Output,
    base: Path,
    output: Path,
    rank: int,
    alpha: float | None,
    targets: str,
    method: str,
    residual: Path | None,
    dtype: str | None,
    seed: int,
    format_name: str,
    base_model: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Make an adapter for BASE that PEFT can train from.

    By default it changes nothing at first: B is zero. Methods that start from the weights also
    write the residual base, W0 − s·B·A, on which such an adapter is to be trained.

    \b
    Example:
      loratool init base/ -o start/ --rank 8 --targets q,v
      loratool init base/ -o start/ --rank 16 --method pissa --residual residual/
      loratool init gpt2/ -o start/ --rank 4 --targets q,v --format loralib
    """
    from loratool.engine import Engine
    from loratool.ops.init import plan_init, run_init

    plan = plan_init(
        base,
        output,
        rank=rank,
        alpha=alpha,
        targets=targets,
        method=method,
        residual=residual,
        dtype=dtype,
        device=device,
        include=include,
        exclude=exclude,
        seed=seed,
        base_model=base_model,
        format=format_name,
        overwrite=overwrite,
    )
    if dry_run:
        _show_plan(out, plan)
        return
    result = run_init(plan, Engine(jobs) if jobs else Engine(), out.progress())
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
    else:
        _show(out, result, output, residual)


def _show_plan(out: Output, plan: InitPlan) -> None:
    from loratool.provenance import document

    if out.as_json:
        out.document(document("init-plan", 1, plan.to_json()))
        return
    out.line(
        f"would start {counted(len(plan.jobs), 'module')}{_of_parts(plan.fused_parts)} at rank "
        f"{plan.rank} with {plan.method}: an adapter of {size_text(plan.adapter_bytes)}"
        + (
            f" and a residual base of {size_text(plan.base.checkpoint.size_bytes)}"
            if plan.residual
            else ""
        )
    )
    out.notes(plan.notes)


def _show(out: Output, report: InitReport, output: Path, residual: Path | None) -> None:
    if out.verbose:
        out.table(
            "modules",
            ["module", "shape", "rank", "of ‖W‖²"],
            [
                [
                    row.name + _of_parts(row.parts),
                    "×".join(map(str, row.shape)),
                    str(row.rank),
                    percent(row.energy_kept),
                ]
                for row in by_name(report.rows)
            ],
        )
    parts = report.facts["fused_parts"]
    out.line(
        f"started {output}: {counted(len(report.rows), 'module')}{_of_parts(parts)}, "
        f"{counted(report.parameters, 'parameter')}, {report.facts['method']}, rank "
        f"{report.facts['rank']}, alpha {report.facts['alpha']:g}"
    )
    if residual is None:
        out.line("B is zero: on the base it changes nothing yet")
    else:
        kept = [row.energy_kept for row in report.rows if row.energy_kept is not None]
        share = sum(kept) / len(kept) if kept else None
        out.line(
            f"residual base: {residual}; train on it. The adapter holds {percent(share)} of the "
            "adapted weights' energy on average"
        )
    if report.facts["format"] == "loralib":
        _show_loralib(out, report, output)
    out.notes(report.facts["notes"])


def _show_loralib(out: Output, report: InitReport, output: Path) -> None:
    from loratool.formats.loralib import WEIGHTS_FILE
    from loratool.layouts.qkv_parts import PARTS

    alpha, parts = report.facts["alpha"], report.facts["fused_parts"]
    layer = f"lora_alpha={alpha:g}"
    back = f"--alpha {alpha:g}"
    if parts:
        layer += f", enable_lora={[part in parts for part in PARTS]} where q, k and v are fused"
        back += f" --fused-parts {','.join(parts)}"
    out.line(
        f"for loralib: {output / WEIGHTS_FILE}, layers of r={report.facts['rank']}, {layer}; "
        f"the file itself says neither"
    )
    out.line(f"after training: loratool convert TRAINED -o OUT {back}")


def _of_parts(parts: Sequence[str]) -> str:
    return f" ({','.join(parts)} of each)" if parts else ""
