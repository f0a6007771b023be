"""The LoRA paper's tables beside ours: docs/paper.md.

    python benchmarks/paper_page.py --write

The paper's figures are constants here; ours are computed when the page is made. Adapters are
trained with PEFT on the base of the example pair. Needs PEFT, transformers and ../shared/data;
without the data it says so and ends.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import median
from peft import PeftModel
from quality_combine import DATA, EXAMPLE, REPOSITORY, ROW_LENGTH, ROWS, table, train
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import loratool as lt
from loratool.layouts.architectures.paper import NAMED, PUBLISHED
from loratool.ops.amplification import AmplificationReport
from loratool.ops.compare_report import CompareReport, PhiGrid
from loratool.ops.estimate import EstimateReport

sys.path.insert(0, str(EXAMPLE))

from train import read_lines

PAGE = REPOSITORY / "docs" / "paper.md"
MEGA = 10**6
SMALL, LARGE = 8, 64
STEPS = 90
MODULES = ("c_attn",)
ROUNDS = 25
TIMED = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
"""The GPT-2 whose forward passes are timed."""


PAPER_FULL, PAPER_LORA = "1.2 TB", "350 GB"
PAPER_CHECKPOINT, PAPER_ADAPTER = "350 GB", "35 MB"
PAPER_AMPLIFICATION = 21.5


def estimates() -> dict[tuple[str, int], EstimateReport]:
    """Every published row, from its config."""
    return {
        (row.model, row.rank): lt.estimate(row.model, rank=row.rank, targets="query,value")
        for row in PUBLISHED
    }


def parameters_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
    rows = []
    for row in PUBLISHED:
        report = ours[row.model, row.rank]
        matrices = sum(adapted.matrices for adapted in report.rows)
        width = max(report.rows[0].shape)
        rows.append(
            [
                row.model,
                f"{matrices} × {width}",
                str(row.rank),
                f"{report.trained:,}",
                f"{row.printed} M",
                "agrees" if row.agrees(report.trained) else "**differs**",
            ]
        )
    return table(["model", "matrices × width", "rank", "ours", "paper", ""], rows)


def disagreements(ours: dict[tuple[str, int], EstimateReport]) -> str:
    wrong = [row for row in PUBLISHED if not row.agrees(ours[row.model, row.rank].trained)]
    listed = "; ".join(
        f"{row.model}: {ours[row.model, row.rank].trained / MEGA:.3f} M counted, "
        f"{row.printed} M printed"
        for row in wrong
    )
    return (
        "Figures agree when the count, rounded or cut off, is what is printed. "
        f"{len(wrong)} of {len(PUBLISHED)} do not agree ({listed}). Query and value of every layer "
        "at the stated rank give the count. Nothing in the stated setting gives the printed "
        "figures, and no other setting is made up here to meet them."
    )


def fused_text() -> str:
    """What PEFT trains where it cannot adapt query and value alone."""
    counts = {
        (row.model, row.rank): lt.estimate(row.model, rank=row.rank, targets="c_attn").trained
        for row in PUBLISHED
        if "gpt" in row.model
    }
    listed = ", ".join(f"{model} rank {rank}: {n:,}" for (model, rank), n in counts.items())
    return (
        "PEFT adapts a fused matrix whole. One pair of factors on q, k and v together, r·(d + 3d), "
        f"has these parameters ({listed}): as many as two pairs on query and value, 2·r·(d + d), "
        "and not the same updates."
    )


def sizes_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
    rows = []
    for (model, rank), report in ours.items():
        adapter = report.adapter_bytes["float16"]
        paper = (PAPER_CHECKPOINT, PAPER_ADAPTER) if (model, rank) == ("gpt3-175b", 4) else ("", "")
        rows.append(
            [
                model,
                str(rank),
                size(report.model_bytes),
                paper[0],
                size(adapter),
                paper[1],
                f"{report.model_bytes / adapter:,.0f} ×",
            ]
        )
    columns = ["model", "rank", "checkpoint", "paper", "adapter", "paper", "smaller"]
    return table(columns, rows)


def memory_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
    rows = []
    for (model, rank), report in ours.items():
        full, lora = report.full_training.total, report.lora_training.total
        paper = (PAPER_FULL, PAPER_LORA) if model == "gpt3-175b" else ("", "")
        rows.append(
            [
                model,
                str(rank),
                size(full),
                paper[0],
                size(lora),
                paper[1],
                f"{full / lora:.1f} ×",
            ]
        )
    columns = ["model", "rank", "all parameters", "paper", "LoRA", "paper", "less"]
    return table(columns, rows)


# Latency --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds, medians of ratios to the base, and what was compared."""

    milliseconds: dict[str, float]
    over_base: dict[str, float]
    parameters: dict[str, int]
    modules: dict[str, int]
    same_graph: bool
    difference: float


def measure_latency(work: Path) -> Latency:
    """Forward passes of base, merged model and adapter model, in turns."""
    torch.manual_seed(0)
    config = GPT2Config(**TIMED, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(work / "timed")
    lt.init(work / "timed", work / "timed-start", rank=SMALL, targets="c_attn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), work / "timed-start").eval()
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.02)
        adapted.save_pretrained(str(work / "timed-adapter"))
        lt.merge(work / "timed", work / "timed-adapter", work / "timed-merged")
        merged = GPT2LMHeadModel.from_pretrained(work / "timed-merged").eval()
    models: dict[str, torch.nn.Module] = {"base": base, "merged": merged, "adapter": adapted}
    tokens = torch.randint(TIMED["vocab_size"], (2, TIMED["n_positions"]))
    answers = {name: _forward(model, tokens)[0] for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name].append(_forward(model, tokens)[1])
    graphs = {name: _graph(model) for name, model in models.items()}
    return Latency(
        {name: 1000 * median(seconds) for name, seconds in times.items()},
        {
            name: median(ours / theirs for ours, theirs in zip(seconds, times["base"], strict=True))
            for name, seconds in times.items()
        },
        {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        {name: len(graph) for name, graph in graphs.items()},
        graphs["base"] == graphs["merged"],
        float((answers["merged"] - answers["adapter"]).abs().max()),
    )


def _forward(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, float]:
    with torch.no_grad():
        start = time.perf_counter()
        answer: Tensor = model(tokens).logits
        return answer, time.perf_counter() - start


def _graph(model: torch.nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def latency_text(latency: Latency) -> str:
    names = {
        "base": "base",
        "merged": "`loratool merge`",
        "adapter": "adapter beside the base (PEFT)",
    }
    rows = [
        [
            title,
            f"{latency.milliseconds[name]:.1f} ms",
            f"{latency.over_base[name]:.2f} ×",
            f"{latency.parameters[name]:,}",
            str(latency.modules[name]),
        ]
        for name, title in names.items()
    ]
    graph = "the same" if latency.same_graph else "**not the same**"
    sizes = ", ".join(f"{key} {value}" for key, value in TIMED.items())
    return "\n\n".join(
        [
            f"Forward passes of a random GPT-2 ({sizes}), two rows of {TIMED['n_positions']} "
            f"tokens, float32 on one thread, {ROUNDS} rounds in turns; medians, and medians of the "
            f"ratios within a round. Modules of base and merged model, by name and class: {graph}. "
            f"Their logits differ from the adapter's by {latency.difference:.1g} at most.",
            table(["model", "forward", "over the base", "parameters", "modules"], rows),
        ]
    )


# Subspaces ------------------------------------------------------------------------------------


def trained_adapters(work: Path) -> dict[str, Path]:
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


def grid_table(grid: PhiGrid, rank: int) -> str:
    columns = [f"j = {j}" for j in grid.j]
    rows = [
        [f"i = {i}", *("" if value is None else f"{value:.2f}" for value in values)]
        for i, values in zip(grid.i, grid.values, strict=True)
        if i <= rank
    ]
    return table(["", *columns], rows)


def subspace_text(ranks: CompareReport, seeds: CompareReport) -> str:
    width = ranks.rows[0].shape[1]
    start = seeds.pairs[0].start
    return "\n\n".join(
        [
            f"Rank {SMALL} (i) against rank {LARGE} (j), different seeds, mean over "
            f"{len(ranks.shared)} modules:",
            grid_table(ranks.pairs[0].phi_a, SMALL),
            f"Rank {LARGE} against rank {LARGE} of another seed (their initial A: "
            f"{start.start if start else 'not judged'}):",
            grid_table(seeds.pairs[0].phi_a, LARGE),
            f"Unrelated directions of a space of {width} dimensions show max(i, j)/{width}: "
            f"{1 / width:.3f} for i = j = 1, {SMALL / width:.2f} for {SMALL}, {LARGE / width:.2f} "
            f"for {LARGE}. {_verdict(ranks.pairs[0].phi_a, width)}",
        ]
    )


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


def amplification_table(reports: dict[str, AmplificationReport]) -> str:
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


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def page(work: Path) -> str:
    """The page. The paper's figures aside, every number in it was computed in this run."""
    ours = estimates()
    latency = measure_latency(work)
    adapters = trained_adapters(work)
    ranks = lt.compare([adapters["r8"], adapters["r64"]])
    seeds = lt.compare([adapters["r64"], adapters["r64-other"]])
    inside = {name: lt.inspect(path, base=EXAMPLE / "base") for name, path in adapters.items()}
    reports = {k: v for k, v in inside.items() if isinstance(v, AmplificationReport)}
    gpt3 = ours["gpt3-175b", 4]
    full, lora = gpt3.full_training, gpt3.lora_training
    parts = [
        "# The LoRA paper's tables beside ours",
        "Made by `python benchmarks/paper_page.py --write`: the paper's figures (Hu et al., LoRA, "
        "ICLR 2022) are quoted, ours computed when the page is made. "
        f"All {len(NAMED)} systems run through every command in `tests/systems`.",
        "## Parameters",
        "`loratool estimate MODEL --rank R --targets query,value`: Σ r·(in + out) over the adapted "
        "matrices. Where q, k and v are stored as one matrix (GPT-2, GPT-3), the parts asked for "
        "count, as in the authors' library (`loratool init --format loralib`).",
        parameters_table(ours),
        disagreements(ours),
        fused_text(),
        "## Checkpoint size",
        "Parameters in float16.",
        sizes_table(ours),
        f"Beside the paper's {PAPER_ADAPTER}: {gpt3.trained:,} values of two bytes are "
        f"{size(gpt3.adapter_bytes['float16'])} or {gpt3.adapter_bytes['float16'] / 2**20:.0f} "
        "MiB.",
        "## Training memory",
        "The formula: 16-bit weights, and for each trained parameter 2 bytes of gradient and 12 of "
        "Adam (a float32 copy and two moments); activations are not counted.",
        memory_table(ours),
        f"For GPT-3 the formula gives {size(full.total)} for full fine-tuning where the paper "
        f"reports {PAPER_FULL}. The paper does not state what its figure holds, and the difference "
        f"is left as it is: weights and gradients alone are {size(full.weights + full.gradients)}, "
        f"with Adam's {size(full.optimizer)} it is the whole. With LoRA the formula's "
        f"{size(lora.total)} are nearly all weights ({size(lora.weights)}), the paper's "
        f"{PAPER_LORA}.",
        "## Latency",
        latency_text(latency),
        "## Subspaces between ranks and seeds",
        f"PEFT adapters on `{MODULES[0]}` of `examples/e2e/base` (query, key and value in one "
        f"matrix), {STEPS} steps of {ROWS} rows of {ROW_LENGTH} bytes each. `loratool compare`: "
        "φ(i, j) of the right singular vectors of A, as §7.2 of the paper draws it.",
        subspace_text(ranks, seeds),
        "## Amplification",
        "`loratool inspect ADAPTER --base BASE`, the figures of §7.3: ‖UᵀWV‖ for the directions of "
        "ΔW, for W's own strongest, and for random ones; amplified is ‖ΔW‖ / ‖UᵀWV‖ for those of "
        f"ΔW. The paper's GPT-3, layer 48, query, rank 4: {PAPER_AMPLIFICATION}.",
        amplification_table(reports),
        _amplification_text(reports),
    ]
    return "\n\n".join(parts) + "\n"


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


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description="The LoRA paper's tables beside ours.")
    parser.add_argument("--write", action="store_true", help=f"replace {PAGE.name}")
    write = parser.parse_args().write
    if not DATA.is_dir():
        sys.exit("needs ../shared/data (the E2E lines), which this checkout does not have")
    torch.set_num_threads(1)  # the models are small: threads would wait for each other
    with tempfile.TemporaryDirectory() as name:
        text = page(Path(name))
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
