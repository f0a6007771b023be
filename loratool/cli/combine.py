"""``loratool combine``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratool.cli import options
from loratool.cli.output import Output
from loratool.cli.updates import show_updates
from loratool.combining.method import Method, Parameter
from loratool.combining.registry import DEFAULT, METHODS, parameters
from loratool.errors import UsageError
from loratool.layouts.families import by_name
from loratool.plural import counted
from loratool.report.text import size_text

if TYPE_CHECKING:
    from loratool.engine import Engine
    from loratool.ops.combine_plan import CombinePlan
    from loratool.ops.weight_search import Trial


def method_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option per parameter that any method declares."""
    for name, users in reversed(parameters().items()):
        command = _option(name, users)(command)
    return command


def _option(name: str, users: list[tuple[Method, Parameter]]) -> Any:
    parameter = users[0][1]
    helps = list(dict.fromkeys(own.help for _, own in users))
    defaults: dict[object, list[str]] = {}
    for user, own in users:
        value = str(own.default).lower() if own.kind is bool else own.default
        defaults.setdefault(value, []).append(user.name)
    text = "; ".join(f"{value} for {', '.join(names)}" for value, names in defaults.items())
    flag = f"--{name.replace('_', '-')}"
    if parameter.kind is bool:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    kinds: dict[type, Any] = {bool: None, int: int, float: options.FINITE, str: str}
    return click.option(
        flag,
        parameter.argument,
        type=click.Choice(parameter.choices) if parameter.choices else kinds[parameter.kind],
        default=None,
        help=f"{' / '.join(helps)} [default: {text}]",
    )


@click.command("combine")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@options.output_option
@click.option(
    "--method",
    default=DEFAULT,
    show_default=True,
    metavar="NAME",
    help=f"How (see docs/methods.md): {', '.join(METHODS)}.",
)
@click.option(
    "--weight",
    multiple=True,
    metavar="[ADAPTER@]PATTERN=W",
    help="Multiplies the weights of matching parameters ('mlp=0.5'), of one adapter where it is "
    "named by path or number ('2@mlp=0'); several numbers are spread over the layers "
    "('layers=0,1'). Repeatable; factors multiply.",
)
@click.option(
    "--rank",
    metavar="N|largest|RULE",
    help="Components to keep: a number, a rule (see docs/ranks.md), or the largest rank that an "
    "adapter has at each weight. [default: largest; cat keeps all]",
)
@click.option("--min-rank", type=click.IntRange(min=1), default=1, help="At least this rank.")
@click.option("--max-rank", type=click.IntRange(min=1), help="At most this rank.")
@click.option(
    "--multiple-of", type=click.IntRange(min=1), default=1, help="Round ranks up to a multiple."
)
@click.option(
    "--saved",
    type=click.Choice(["refuse", "mean", "first", "drop"]),
    default="refuse",
    show_default=True,
    help="For parameters that several adapters store whole with different values.",
)
@click.option(
    "--dtype", help="Dtype of the factors [default: the adapters', float32 if they differ]."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of all random numbers.")
@options.alpha_option
@options.format_option
@click.option(
    "--write-recipe",
    type=options.PATH,
    metavar="FILE",
    help="Also write all of this to FILE.yaml, with hashes of the adapters, to make it again.",
)
@click.option(
    "--weights-from",
    metavar="COMMAND",
    help="Search the weights: COMMAND gets the path of a combined adapter as its last argument and "
    "prints a number, the lower the better. Starts from the given weights.",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=40, show_default=True, help="Of the search."
)
@click.option(
    "--penalty",
    type=options.FINITE,
    default=0.05,
    show_default=True,
    help="Of the search: this times the mean |weight| is added to the number.",
)
@method_options
@options.include_option
@options.exclude_option
@options.device_option
@options.jobs_option
@options.report_option
@options.dry_run_option
@options.overwrite_option
@options.framed
def combine_command(
    out: Output,
    adapters: tuple[str, ...],
    output: Path,
    method: str,
    weight: tuple[str, ...],
    rank: str | None,
    min_rank: int,
    max_rank: int | None,
    multiple_of: int,
    saved: str,
    dtype: str | None,
    seed: int,
    alpha: float | None,
    format_name: str,
    write_recipe: Path | None,
    weights_from: str | None,
    trials: int,
    penalty: float,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    jobs: int | None,
    report: Path | None,
    dry_run: bool,
    overwrite: bool,
    **given: Any,
) -> None:
    """Combine adapters into one: their updates are added, averaged or voted on, not their factors.

    ADAPTER is a folder or file in any format that loratool reads; :WEIGHT multiplies its update,
    and a negative weight subtracts it. The result is an adapter folder with a report of every
    weight: its rank and its relative error against the exact result of the method. A single
    ADAPTER that ends in .yaml is a recipe, which says everything itself.

    \b
    Example:
      loratool combine styles/a:0.7 styles/b:0.3 -o both/
      loratool combine a/ b/ c/ -o voted/ --method ties --density 0.3 --rank energy:0.95
      loratool combine recipe.yaml -o made/
    """
    from loratool.algebra.ranks import RankLimits
    from loratool.engine import Engine
    from loratool.ops.combine import run_combine
    from loratool.ops.combine_plan import Combination, plan_combine
    from loratool.ops.combine_saved import Saved
    from loratool.ops.combine_weights import parse_rule, parse_source
    from loratool.ops.recipe import check_recipe_path, is_recipe, load_recipe
    from loratool.ops.recipe import write_recipe as save_recipe
    from loratool.ops.weight_search import Search, forget, search_weights

    if write_recipe is not None:
        check_recipe_path(write_recipe)
    if len(adapters) == 1 and is_recipe(adapters[0]):
        _refuse_beside_recipe()
        asked = load_recipe(Path(adapters[0]))
    else:
        sources = tuple(parse_source(text) for text in adapters)
        asked = Combination(
            sources,
            method,
            _given(given),
            tuple(parse_rule(text, sources) for text in weight),
            rank,
            RankLimits(min_rank, max_rank, multiple_of),
            Saved(saved),
            dtype,
            seed,
            include,
            exclude,
            alpha,
            format_name,
        )
    plan = plan_combine(asked, output, device=device, overwrite=overwrite)
    engine = Engine(jobs) if jobs else Engine()
    if dry_run:
        _show_plan(out, plan, engine)
        return
    found = None
    if weights_from is not None:
        wanted = Search.of(weights_from, trials, penalty)
        asked, found = search_weights(
            asked, output, wanted, device=device, engine=engine, told=partial(_tell_trial, out)
        )
        plan = plan_combine(asked, output, device=device, overwrite=overwrite)
    result = run_combine(plan, engine, out.progress(), found)
    if found is not None:
        forget(output)
    if write_recipe is not None:
        save_recipe(write_recipe, asked)
    out.report_file(report, result.to_json())
    if out.as_json:
        out.document(result.to_json())
        return
    count = len(plan.adapters)
    show_updates(
        out, result, f"{output}: {plan.method.name} of {counted(count, 'adapter')}", output
    )
    if found is not None:
        weights = ", ".join(f"{s.label} {s.weight:g}" for s in asked.sources)
        out.line(f"weights after {counted(found['trials'], 'trial')}: {weights}")
        start = found["start"]["score"]
        before = "none" if start is None else f"{start:g}"
        out.line(f"score {found['best']['score']:g}, at the start {before}")


def _tell_trial(out: Output, number: int, trial: Trial) -> None:
    if not out.as_json and not out.quiet:
        weights = " ".join(f"{weight:g}" for weight in trial.weights)
        kept = ", kept from before" if trial.recorded else ""
        out.complain(f"trial {number}: weights {weights}, score {trial.score:g}{kept}")


_BESIDE_RECIPE = {
    "adapters", "output", "write_recipe", "device", "jobs", "report", "dry_run", "overwrite",
    "as_json", "quiet", "verbose", "debug",
}  # fmt: skip


def _refuse_beside_recipe() -> None:
    """A recipe says everything that decides the result; an option would be quietly ignored."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in _BESIDE_RECIPE:
            raise UsageError(
                f"{parameter.opts[0]} does not go with a recipe", hint="change the recipe instead"
            )


def _given(values: dict[str, Any]) -> dict[str, object]:
    """Parameters that were given, by their own names."""
    names = {users[0][1].argument: name for name, users in parameters().items()}
    return {names[key]: value for key, value in values.items() if value is not None}


def _show_plan(out: Output, plan: CombinePlan, engine: Engine) -> None:
    from loratool.provenance import document

    body = plan.to_json(engine.workers)
    if out.as_json:
        out.document(document("combine-plan", 1, body))
        return
    out.line(
        f"would combine {counted(len(plan.adapters), 'adapter')} by {plan.method.name}, rank "
        f"{plan.rank}, in {plan.dtype.name} on {plan.device}"
    )
    out.table(
        "adapters",
        ["adapter", "weight", "updates", "stored whole", "format"],
        [
            [
                source.label,
                f"{source.weight:g}",
                str(len(adapter.low_rank)),
                str(len(adapter.replacements)),
                adapter.format,
            ]
            for source, adapter in zip(plan.asked.sources, plan.adapters, strict=True)
        ],
    )
    if out.verbose:
        out.table(
            "weights",
            ["parameter", "shape", "ranks", "weights", "rank at most"],
            [
                [
                    job.name,
                    "×".join(map(str, job.shape)),
                    " ".join(map(str, job.ranks)),
                    " ".join(f"{weight:g}" for weight in job.weights),
                    str(job.rank_at_most),
                ]
                for job in by_name(plan.jobs)
            ],
        )
    out.line(f"reads {size_text(plan.read_bytes)}")
    out.line(f"adapter: at most {size_text(plan.adapter_bytes_at_most)}")
    out.line(f"working memory: about {size_text(plan.peak_bytes(engine.workers))}")
    out.notes(plan.notes)
