"""``loratool extract``."""

from __future__ import annotations

from pathlib import Path

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.errors import UsageError


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
    from loratool.cli.extract_output import show_plan, show_ranks, show_report
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
        show_ranks(out, plan, engine, max_rank)
        return
    if dry_run:
        show_plan(out, plan, engine)
        return
    result = run_extract(plan, engine, out.progress())
    out.report_file(report, result.timed_json())
    if out.as_json:
        out.document(result.timed_json())
    else:
        show_report(out, result, output)


def _rank_for(pairs: tuple[str, ...]) -> dict[str, str]:
    ranks: dict[str, str] = {}
    for text in pairs:
        pattern, equals, rank = text.rpartition("=")
        if not equals or not pattern or not rank:
            raise UsageError(f"--rank-for {text!r} is not of the form PATTERN=RANK")
        ranks.pop(pattern, None)  # the last one wins: it has to be last
        ranks[pattern] = rank
    return ranks
