"""The LoRA paper's section 7, subspaces and amplification, of adapters of the example pair."""

from __future__ import annotations

import sys
from pathlib import Path

from quality_combine import DATA, EXAMPLE, ROW_LENGTH, ROWS, table, train

import loratool as lt
from loratool.ops.amplification import AmplificationReport
from loratool.ops.compare_report import CompareReport, PhiGrid

sys.path.insert(0, str(EXAMPLE))

from train import read_lines

SMALL, LARGE = 8, 64
STEPS = 90
MODULES = ("c_attn",)
PAPER_AMPLIFICATION = 21.5


def sections(work: Path) -> list[str]:
    """Of adapters that are trained now. work: a folder for them."""
    adapters = _trained_adapters(work)
    ranks = lt.compare([adapters["r8"], adapters["r64"]])
    seeds = lt.compare([adapters["r64"], adapters["r64-other"]])
    inside = {name: lt.inspect(path, base=EXAMPLE / "base") for name, path in adapters.items()}
    reports = {k: v for k, v in inside.items() if isinstance(v, AmplificationReport)}
    return [
        "## Subspaces between ranks and seeds",
        f"PEFT adapters on `{MODULES[0]}` of `examples/e2e/base` (query, key and value in one "
        f"matrix), {STEPS} steps of {ROWS} rows of {ROW_LENGTH} bytes each. `loratool compare`: "
        "φ(i, j) of the right singular vectors of A, as §7.2 of the paper draws it.",
        _subspace_text(ranks, seeds),
        "## Amplification",
        "`loratool inspect ADAPTER --base BASE`, the figures of §7.3: ‖UᵀWV‖ for the directions of "
        "ΔW, for W's own strongest, and for random ones; amplified is ‖ΔW‖ / ‖UᵀWV‖ for those of "
        f"ΔW. The paper's GPT-3, layer 48, query, rank 4: {PAPER_AMPLIFICATION}.",
        _amplification_table(reports),
        _amplification_text(reports),
    ]


def _trained_adapters(work: Path) -> dict[str, Path]:
    """One of rank 8 and two of rank 64, each of its own seed, and two cut out of a full tuning."""
    lines = read_lines(DATA / "e2e_valid.txt")
    made = {
        name: train(lines, work / name, seed, rank=rank, modules=MODULES, steps=STEPS)
        for name, rank, seed in (("r8", SMALL, 1), ("r64", LARGE, 2), ("r64-other", LARGE, 3))
    }
    for rank in (SMALL, LARGE):
        out = work / f"full-r{rank}"
        lt.extract(
            EXAMPLE / "base", EXAMPLE / "tuned", out, rank=rank, include=MODULES, drop_rest=True
        )
        made[f"full-r{rank}"] = out
    return made


def _subspace_text(ranks: CompareReport, seeds: CompareReport) -> str:
    width = ranks.rows[0].shape[1]
    start = seeds.pairs[0].start
    return "\n\n".join(
        [
            f"Rank {SMALL} (i) against rank {LARGE} (j), different seeds, mean over "
            f"{len(ranks.shared)} modules:",
            _grid_table(ranks.pairs[0].phi_a, SMALL),
            f"Rank {LARGE} against rank {LARGE} of another seed (their initial A: "
            f"{start.start if start else 'not judged'}):",
            _grid_table(seeds.pairs[0].phi_a, LARGE),
            f"Unrelated directions of a space of {width} dimensions show max(i, j)/{width}: "
            f"{1 / width:.3f} for i = j = 1, {SMALL / width:.2f} for {SMALL}, {LARGE / width:.2f} "
            f"for {LARGE}. {_verdict(ranks.pairs[0].phi_a, width)}",
        ]
    )


def _grid_table(grid: PhiGrid, rank: int) -> str:
    columns = [f"j = {j}" for j in grid.j]
    rows = [
        [f"i = {i}", *("" if value is None else f"{value:.2f}" for value in values)]
        for i, values in zip(grid.i, grid.values, strict=True)
        if i <= rank
    ]
    return table(["", *columns], rows)


def _verdict(grid: PhiGrid, width: int) -> str:
    first, whole = grid.values[0][-1], grid.values[-1][-1]
    assert first is not None
    assert whole is not None
    chance = LARGE / width
    return (
        f"Of rank {SMALL}'s first direction, {first:.2f} lies in rank {LARGE}'s space, of all "
        f"{SMALL} directions {whole:.2f}, where chance gives {chance:.2f}. The paper finds that "
        "the leading directions agree between ranks and seeds and the rest do not; here the "
        f"leading one is {first / max(whole, 1e-9):.1f} × as much inside as all on average."
    )


def _amplification_table(reports: dict[str, AmplificationReport]) -> str:
    titles = {
        "r8": f"trained, rank {SMALL}",
        "r64": f"trained, rank {LARGE}",
        "full-r8": f"full tuning, extracted, rank {SMALL}",
        "full-r64": f"full tuning, extracted, rank {LARGE}",
    }
    rows = []
    for name, title in titles.items():
        for row in reports[name].rows:
            rows.append(
                [
                    title,
                    row.name.split(".")[2],
                    f"{row.delta_norm:.2f}",
                    f"{row.base_norm:.2f}",
                    f"{row.inside:.2f}",
                    f"{row.inside_own:.2f}",
                    f"{row.inside_by_chance:.2f}",
                    "" if row.amplification is None else f"{row.amplification:.2f}",
                ]
            )
    columns = ["adapter", "layer", "‖ΔW‖", "‖W‖", "ΔW's", "W's", "random", "amplified"]
    return table(columns, rows)


def _amplification_text(reports: dict[str, AmplificationReport]) -> str:
    means = {
        name: sum(row.amplification or 0.0 for row in report.rows) / len(report.rows)
        for name, report in reports.items()
    }
    between = all(
        row.inside_by_chance < row.inside < row.inside_own
        for report in reports.values()
        for row in report.rows
    )
    where = (
        "In every module ‖UᵀWV‖ of ΔW lies above random and below W's own, as in the paper: the "
        "update is correlated with W and yet does not repeat its strongest directions. "
        if between
        else "Not in every module does ‖UᵀWV‖ of ΔW lie between random and W's own, as the paper "
        "has it. "
    )
    return (
        f"{where}Mean factors: {means['r8']:.1f} at rank {SMALL} and {means['r64']:.1f} at rank "
        f"{LARGE} where trained, {means['full-r8']:.1f} and {means['full-r64']:.1f} where "
        "extracted. The model is far smaller than the paper's and its base has seen no text like "
        "the task's, so the sizes need not be the paper's."
    )
