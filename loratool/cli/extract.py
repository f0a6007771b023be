"""``loratool extract``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli import options
from loratool.cli.output import Output, fitting
from loratool.errors import UsageError
from loratool.layouts.families import by_name, family_of
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.engine import Engine
    from loratool.ops.extract_plan import ExtractPlan
    from loratool.ops.extract_report import ExtractReport, TensorRow


class _ExtractCommand(click.Command):
    """Understands ``--dry-run=ranks`` beside the plain flag ``--dry-run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, ["--dry-run-ranks" if word == "--dry-run=ranks" else word for word in args]
        )


@click.command("extract", cls=_ExtractCommand)
@click.argument("base", type=options.PATH)
@click.argument("tuned", type=options.PATH)
@options.output_option
@click.option(
    "--rank",
    default="16",
    show_default=True,
    metavar="N|full|RULE",
    help="Components to keep: a number, full, a rule such as energy:0.95, error:0.1 or auto "
    "(see docs/ranks.md), or a global budget such as budget:20MB or budget:2%.",
)
@click.option(
    "--rank-for",
    multiple=True,
    metavar="PATTERN=RANK",
    help="Another rank or rule for matching parameters ('mlp=32'), or whole to store them whole; "
    "repeatable, the last one wins.",
)
@click.option(
    "--conv-rank",
    metavar="N|full|RULE|same",
    help="Factorise convolutions too, with this rank or rule, or the same as --rank "
    "[default: they are stored whole].",
)
@click.option("--min-rank", type=click.IntRange(min=1), default=1, help="At least this rank.")
@click.option("--max-rank", type=click.IntRange(min=1), help="At most this rank.")
@click.option(
    "--multiple-of", type=click.IntRange(min=1), default=1, help="Round ranks up to a multiple."
)
@click.option(
    "--targets",
    metavar="attention|mlp|all-linear|all-conv|q,v|REGEX",
    help="Only these modules, by role, short names (a list of either) or regular expression.",
)
@click.option("--dtype", help="Dtype of the factors [default: the tuned checkpoint's].")
@click.option(
    "--drop-rest",
    is_flag=True,
    help="Leave out what changed and is not low-rank (norms, biases, position tables, a tied "
    "embedding) instead of storing it whole, and state its share.",
)
@click.option(
    "--split-fused",
    is_flag=True,
    help="Name the parts of fused q|k|v and gate|up layers apart (q_proj …), as servers do that "
    "fuse them themselves. Not for PEFT, which has the base's modules only.",
)
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    default="auto",
    show_default=True,
    help="exact forbids the randomised method for large matrices.",
)
@click.option(
    "--sketch-dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the products that steer the randomised method; auto is bfloat16 where the device "
    "multiplies it natively.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised method.")
@click.option("--base-model", metavar="OWNER/NAME", help="The base's Hub name, for the adapter.")
@click.option(
    "--profile",
    default="peft",
    show_default=True,
    metavar="peft|vllm|sglang|llama.cpp",
    help="Guarantee what this consumer takes (one rank, nothing stored whole), or say what is in "
    "the way.",
)
@click.option(
    "--into",
    type=options.PATH,
    metavar="ADAPTER",
    help="Continue from an adapter of BASE: keep its factors, and extract only what it does not "
    "explain of the change, at the rank of --rank.",
)
@options.alpha_option
@click.option(
    "--bias",
    type=click.Choice(["whole", "lora_bias"]),
    default="whole",
    show_default=True,
    help="Store biases whole, or as differences beside the factors of their modules.",
)
@click.option(
    "--dora",
    is_flag=True,
    help="Make a DoRA: the tuned weights' row norms as they are, directions by low-rank factors.",
)
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and say what would happen; write nothing. --dry-run=ranks reads the "
    "spectra and shows what each rank would cost and keep.",
)
@click.option("--dry-run-ranks", is_flag=True, hidden=True)
@options.overwrite_option
@options.framed
def extract_command(
    out: Output,
    base: Path,
    tuned: Path,
    output: Path,
    rank: str,
    rank_for: tuple[str, ...],
    min_rank: int,
    max_rank: int | None,
    multiple_of: int,
    conv_rank: str | None,
    targets: str | None,
    dtype: str | None,
    drop_rest: bool,
    split_fused: bool,
    svd: str,
    sketch_dtype: str,
    seed: int,
    base_model: str | None,
    profile: str,
    into: Path | None,
    alpha: float | None,
    bias: str,
    dora: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    dry_run_ranks: bool,
    overwrite: bool,
) -> None:
    """Extract a low-rank adapter: what turned BASE into TUNED.

    BASE and TUNED are weight files or folders. The result is a PEFT adapter folder with a report
    of every tensor: its rank, its relative error ‖D − s·B·A‖/‖D‖ as stored, what was stored
    whole, and what did not change.

    \b
    Example:
      loratool extract base/ tuned/ -o adapter/ --rank 16
    """
    from loratool.engine import Engine
    from loratool.ops.extract import run_extract
    from loratool.ops.extract_plan import plan_extract

    plan = plan_extract(
        base,
        tuned,
        output,
        rank=rank,
        rank_for=_rank_for(rank_for),
        min_rank=min_rank,
        max_rank=max_rank,
        multiple_of=multiple_of,
        conv_rank=conv_rank,
        targets=targets,
        dtype=dtype,
        device=device,
        include=include,
        exclude=exclude,
        drop_rest=drop_rest,
        split_fused=split_fused,
        exact=svd == "exact",
        sketch_dtype=sketch_dtype,
        seed=seed,
        base_model=base_model,
        profile=profile,
        into=into,
        alpha=alpha,
        bias=bias,
        dora=dora,
        overwrite=overwrite,
    )
    engine = Engine(jobs) if jobs else Engine()
    if dry_run_ranks:
        _show_ranks(out, plan, engine, max_rank)
        return
    if dry_run:
        _show_plan(out, plan, engine)
        return
    result = run_extract(plan, engine, out.progress())
    out.report_file(report, result.timed_json())
    if out.as_json:
        out.document(result.timed_json())
    else:
        _show(out, result, output)


def _rank_for(pairs: tuple[str, ...]) -> dict[str, str]:
    ranks: dict[str, str] = {}
    for text in pairs:
        pattern, equals, rank = text.rpartition("=")
        if not equals or not pattern or not rank:
            raise UsageError(f"--rank-for {text!r} is not of the form PATTERN=RANK")
        ranks.pop(pattern, None)  # the last one wins: it has to be last
        ranks[pattern] = rank
    return ranks


def _show_ranks(out: Output, plan: ExtractPlan, engine: Engine, max_rank: int | None) -> None:
    from loratool.ops.extract_jobs import Treatment
    from loratool.ops.extract_tradeoff import rank_tradeoff

    tradeoff = rank_tradeoff(plan, max_rank=max_rank, engine=engine, progress=out.progress())
    if out.as_json:
        out.document(tradeoff.to_json())
        return
    out.table(
        f"{tradeoff.matrices} changed matrices, factors in {plan.dtype.name}",
        ["rank", "parameters", "size", "error", "energy kept", "error as a budget"],
        [
            [
                str(row.rank),
                f"{row.parameters:,}",
                size_text(row.nbytes),
                percent(row.error),
                percent(1 - row.error**2),
                percent(row.budget_error),
            ]
            for row in tradeoff.rows
        ],
        text=0,
    )
    if plan.into is not None:
        out.line("of what the adapter of --into leaves of the change")
    if len({job.rule for job in plan.jobs if job.treatment is Treatment.LOW_RANK}) > 1:
        out.line("one rank for all of them: --rank-for and --conv-rank are not in the table")
    if any(job.dora for job in plan.jobs):
        out.line("of a LoRA: what --dora makes of these ranks is not in the table")
    out.line("error: ‖D − D_r‖ / ‖D‖ over these matrices, before the factors are rounded")
    out.line("as a budget: the same size by --rank budget:SIZE, spent where it helps most")


def _show_plan(out: Output, plan: ExtractPlan, engine: Engine) -> None:
    from loratool.provenance import document

    if out.as_json:
        out.document(document("extract-plan", 1, plan.to_json(engine.workers)))
        return
    counts: dict[str, int] = defaultdict(int)
    for job in plan.jobs:
        counts[plan.if_changed(job)] += 1
    out.line(f"would extract at rank {plan.rank} in {plan.dtype.name} on {plan.device}")
    out.table(
        "if they changed",
        ["treatment", "tensors"],
        [[treatment, str(count)] for treatment, count in counts.items()],
    )
    out.line(f"reads {size_text(plan.read_bytes)}")
    at_most = plan.forecast
    out.line(f"adapter: at most {size_text(at_most.bytes_at_most)}")
    out.line(f"working memory: about {size_text(plan.peak_bytes(engine.workers))}")
    out.notes((*plan.notes, *at_most.notes))


def _show(out: Output, report: ExtractReport, output: Path) -> None:
    from loratool.ops.extract_report import LEFT_OUT, Status

    low_rank = [row for row in report.rows if row.status is Status.LOW_RANK]
    if out.verbose:
        out.table(
            "every tensor",
            [
                "tensor",
                "status",
                "shape",
                "rank",
                "error",
                "excess ≤",
                "energy kept",
                "share of change",
            ],
            [_tensor_cells(row, report) for row in by_name(report.rows)],
            text=2,
        )
        out.line("seconds, added up over the workers: " + _stages(report.seconds))
    lines = _family_lines(low_rank, report)
    columns = fitting(out.width, lines, _ORDER, ("module", "rank", "error"), _BY_WORTH)
    out.table(
        f"{output}: rank {report.rank}, {report.dtype}, computed on {report.device}",
        columns,
        [[line[column] for column in columns] for line in lines],
    )
    for status in (Status.WHOLE, Status.DIFFERENCE, Status.NEW_ROWS, *LEFT_OUT):
        rows = [row for row in report.rows if row.status is status]
        if rows:
            share = _share(sum(row.energy for row in rows), report)
            what = f"{percent(share)} of the change's energy"
            if status is Status.NEW_ROWS:
                what = f"{rows[0].added_rows} tokens added"
            if status is Status.NOT_MEASURED:
                what = "of unknown size"
            out.line(f"{status}: {_kinds(rows)} ({what})")
    if unchanged := report.count(Status.UNCHANGED):
        out.line(f"unchanged: {unchanged} tensors")
    out.line(
        f"base + adapter gives back {percent(1 - report.relative_error**2)} of the change's "
        f"energy (relative error {percent(report.relative_error)})"
    )
    out.line(
        f"adapter: {report.adapter_parameters:,} values, {size_text(report.adapter_bytes)} "
        f"in {output}"
    )
    if summary := report.lora_summary():
        out.line(summary)
    out.notes(report.notes)


def _share(energy: float, report: ExtractReport) -> float:
    return energy / report.energy if report.energy else 0.0


def _tensor_cells(row: TensorRow, report: ExtractReport) -> list[str]:
    return [
        row.name,
        str(row.status),
        "×".join(map(str, row.shape)),
        _rank_cell(row),
        percent(row.relative_error),
        percent(row.excess_bound),
        percent(row.energy_kept),
        "tied" if row.tied_to else percent(_share(row.energy, report)),
    ]


def _rank_cell(row: TensorRow) -> str:
    if row.rank is None:
        return ""
    kept = "" if row.kept_rank is None else f" ({row.kept_rank} kept)"
    return f"{row.rank}{kept}{' (clamped)' if row.clamped else ''}"


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items())


_ORDER = ("module", "tensors", "rank", "error", "energy kept", "share of change")
_BY_WORTH = ("share of change", "tensors", "energy kept")


def _family_lines(rows: list[TensorRow], report: ExtractReport) -> list[dict[str, str]]:
    families: dict[str, list[TensorRow]] = defaultdict(list)
    for row in by_name(rows):
        families[family_of(row.name).removesuffix(".weight")].append(row)
    lines = []
    for family, members in families.items():
        energy = sum(row.energy for row in members)
        kept = sum(row.energy * (row.energy_kept or 0.0) for row in members) / energy
        ranks = sorted({row.rank or 0 for row in members})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        error = max(1 - kept, 0.0) ** 0.5
        cells = [family, str(len(members)), span, percent(error), percent(kept)]
        lines.append(dict(zip(_ORDER, [*cells, percent(_share(energy, report))], strict=True)))
    return lines


def _kinds(rows: list[TensorRow]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row.kind] += 1
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
