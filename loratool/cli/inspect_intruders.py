"""Intruder dimensions, as ``loratool inspect --intruders`` shows them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratool.cli.output import Output, fitting, span
from loratool.cli.tables import Sorts, in_order
from loratool.errors import UsageError
from loratool.layouts.families import natural
from loratool.plural import counted
from loratool.provenance import document
from loratool.report.text import percent, size_text

if TYPE_CHECKING:
    from loratool.ops.intruders import IntruderReport, IntruderRow
    from loratool.ops.mitigate import MitigatePlan

_ORDER = (
    *("module", "tensors", "intruders", "of", "first", "cosine", "energy"),
    *("σ(ΔW)/σ(W)", "exact"),
)
_BY_WORTH = ("of", "energy", "σ(ΔW)/σ(W)", "cosine", "tensors", "first", "exact")


SORTS: Sorts[tuple[str, list[IntruderRow]]] = {
    "intruders": lambda line: -sum(row.intruders for row in line[1]),
    "energy": lambda line: -max(row.intruder_energy for row in line[1]),
    "strength": lambda line: -max(row.strength or 0.0 for row in line[1]),
    "name": lambda line: natural(line[0]),
}


class Looking(NamedTuple):
    """What to examine, and how."""

    top: int | None
    epsilon: float | None
    exact: bool
    only: tuple[str, ...]
    alpha: float | None
    device: str
    jobs: int | None
    level: str | None


class Writing(NamedTuple):
    """What to write. factor: None to look only."""

    factor: float | None
    output: Path | None
    dry_run: bool
    overwrite: bool


def look_for_intruders(
    out: Output, paths: tuple[Path, ...], base: Path | None, view: Looking, writing: Writing
) -> IntruderReport | None:
    """Find them, and weaken them where that was asked for; None of a dry run. Raises
    UsageError."""
    from loratool.engine import Engine
    from loratool.ops.intruders import EPSILON, TOP, find_intruders, plan_looking
    from loratool.ops.mitigate import plan_mitigate, run_mitigate

    both = [*([base] if base else []), *paths]
    if len(both) != 2:
        raise UsageError(
            "intruders are of what was tuned beside its base",
            hint="name BASE and TUNED, or an adapter and its --base",
        )
    if view.level not in (None, "spectra"):
        raise UsageError("intruders are at level spectra")
    first, second = both
    engine = Engine(view.jobs) if view.jobs else Engine()
    asked: dict[str, Any] = {
        "top": TOP if view.top is None else view.top,
        "epsilon": EPSILON if view.epsilon is None else view.epsilon,
        "exact": view.exact,
        "only": view.only,
        "alpha": view.alpha,
        "device": view.device,
    }
    if writing.factor is None:
        if writing.output is not None or writing.dry_run or writing.overwrite:
            raise UsageError("-o, --dry-run and --overwrite go with --mitigate FACTOR")
        return find_intruders(
            plan_looking(first, second, **asked), engine=engine, progress=out.progress()
        )
    if writing.output is None:
        raise UsageError("--mitigate: no output is named", hint="name it after -o")
    plan = plan_mitigate(
        first, second, writing.output, factor=writing.factor, overwrite=writing.overwrite, **asked
    )
    if not writing.dry_run:
        return run_mitigate(plan, engine, out.progress())
    if out.as_json:
        out.document(document("mitigate-plan", 1, plan.to_json()))
    else:
        show_mitigate_plan(out, plan)
    return None


def show_intruders(out: Output, report: IntruderReport, sort: str | None) -> None:
    from loratool.layouts.families import family_of

    families: dict[str, list[IntruderRow]] = defaultdict(list)
    for row in report.rows:
        families[row.name if out.verbose else family_of(row.name)].append(row)
    examined = sum(len(row.directions) for row in report.rows)
    out.line(
        f"{report.tuned} beside {report.base}: {report.intruders:,} of the {examined:,} strongest "
        f"directions of {counted(len(report.rows), 'weight')} are intruders"
    )
    lines = [_line(*line) for line in in_order(list(families.items()), sort, SORTS)]
    if lines:
        columns = fitting(out.width, lines, _ORDER, ("module", "intruders"), _BY_WORTH)
        out.table(
            f"top {report.asked.top} of each, every cosine below {report.asked.epsilon:g}; "
            f"computed on {report.device}",
            columns,
            [[line.get(column, "") for column in columns] for line in lines],
        )
        for column, text in _LEGEND.items():
            if column in columns:
                out.line(text)
    if report.unchanged:
        out.line(f"unchanged: {counted(report.unchanged, 'weight')}")
    if (done := report.mitigated) is not None:
        out.line(
            f"{done.output}: {done.kind} with the intruders of "
            f"{counted(done.tensors, 'weight')} at {done.factor:g} of their size"
            + (
                f"; its factors miss {done.error:.1e} of the change"
                if done.kind != "checkpoint"
                else ""
            )
        )
    out.notes(report.notes)


_LEGEND = {
    "first": "first: place of the first intruder among W's singular values, over the weights",
    "cosine": "cosine: the largest |cos| of an intruder to any direction of W0 is at most this",
    "energy": "energy: share of ‖W‖² that the intruders hold, the most of any weight",
    "σ(ΔW)/σ(W)": "σ(ΔW)/σ(W): largest singular values of the change, and of the base's weight",
    "exact": "exact: weights whose spectra had to be resolved whole to be certain",
}


def _line(name: str, rows: list[IntruderRow]) -> dict[str, str]:
    found = [one for row in rows for one in row.directions if one.intruder]
    strengths = [row.strength for row in rows if row.strength is not None]
    return {
        "module": name.removesuffix(".weight"),
        "tensors": str(len(rows)),
        "intruders": str(len(found)),
        "of": str(sum(len(row.directions) for row in rows)),
        "first": str(min(one.index for one in found)) if found else "",
        "cosine": f"{max(one.cosine_at_most for one in found):.2f}" if found else "",
        "energy": percent(max(row.intruder_energy for row in rows)),
        "σ(ΔW)/σ(W)": span(strengths),
        "exact": str(sum(row.exact for row in rows)),
    }


def show_mitigate_plan(out: Output, plan: MitigatePlan) -> None:
    """What --dry-run says of a mitigation."""
    body = plan.to_json()
    out.line(
        f"would examine {counted(len(body['weights']), 'weight')} of {body['tuned']} beside "
        f"{body['base']}, reading {size_text(body['read_bytes'])}"
    )
    out.line(
        f"would write {plan.output}: {'an' if plan.writes_adapter else 'a'} {body['kind']} of at "
        f"most {size_text(body['output_bytes_at_most'])}, intruders at {plan.factor:g} of their "
        "size"
    )
    out.notes(body["notes"])
