"""What is left of three small adapters after each way of combining them.

    python benchmarks/quality_combine.py --write

Three LoRA adapters are trained with PEFT on the base of the example pair, one per task, combined
with every registered method, added to the base, and measured on lines of all tasks that no
training saw. Needs PEFT, transformers and ../shared/data; without the data it says so and ends.
With --write the page docs/methods-quality.md is replaced.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import PreTrainedModel

import loratool as lt
from loratool.combining.registry import METHODS
from loratool.ops.combine import run_combine
from loratool.ops.combine_plan import Combination, plan_combine
from loratool.ops.combine_weights import Source
from loratool.ops.compare_report import CompareReport

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "examples" / "e2e"
DATA = REPOSITORY.parent / "shared" / "data"
PAGE = REPOSITORY / "docs" / "methods-quality.md"
sys.path.insert(0, str(EXAMPLE))

from evaluate import bits_per_byte, load, read_lines  # noqa: E402
from train import N_POSITIONS, packed_rows  # noqa: E402

RANK = 8
STEPS = 150
ROW_LENGTH = 192
ROWS = 8
RATE = 4e-3
HELDOUT = 24
SCALES = (1 / 3, 2 / 3, 1.0)
"""Multiples of each combination that are measured: methods differ in how large a result is."""

Losses = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One kind of lines. No meaning representation is in both parts."""

    name: str
    what: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]


def tasks() -> list[Task]:
    """Two kinds of places, and one direction reversed."""
    valid, test = (read_lines(DATA / f"e2e_{part}.txt") for part in ("valid", "test"))
    coffee, coffee_heldout = split([line for line in valid if "Type : coffee shop" in line])
    pubs, pubs_heldout = split([line for line in test if "Type : pub" in line])
    return [
        Task("coffee", "coffee shops: `meaning||text`", coffee, coffee_heldout),
        Task("pub", "pubs: `meaning||text`", pubs, pubs_heldout),
        Task(
            "reversed",
            "coffee shops: `text||meaning`",
            tuple(map(turned, coffee)),
            tuple(map(turned, coffee_heldout)),
        ),
    ]


def split(lines: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lines to train on, and one line each of other meaning representations."""
    fitting = [line for line in lines if len(line.encode()) < N_POSITIONS - 1]
    meanings = sorted({line.partition("||")[0] for line in fitting})
    random.Random(0).shuffle(meanings)
    apart = set(meanings[:HELDOUT])
    first = {line.partition("||")[0]: line for line in reversed(fitting)}
    training = tuple(line for line in fitting if line.partition("||")[0] not in apart)
    return training, tuple(first[meaning] for meaning in meanings[:HELDOUT])


def turned(line: str) -> str:
    meaning, _, text = line.partition("||")
    return f"{text}||{meaning}"


def train(
    lines: Sequence[str],
    folder: Path,
    seed: int,
    *,
    rank: int = RANK,
    modules: Sequence[str] = ("c_attn", "c_proj", "c_fc"),
    steps: int = STEPS,
) -> Path:
    """A LoRA of its own seed, on attention and MLP unless told otherwise."""
    model = load(EXAMPLE / "base")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(modules),
        fan_in_fan_out=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config)
    chosen = [value for value in adapted.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=RATE, weight_decay=0.0)
    rows = packed_rows(lines, ROW_LENGTH, seed)
    adapted.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        batch = torch.tensor([list(next(rows)) for _ in range(ROWS)])
        starts = torch.randint(N_POSITIONS - ROW_LENGTH + 1, (ROWS, 1))
        positions = starts + torch.arange(ROW_LENGTH)
        logits = adapted(input_ids=batch[:, :-1], position_ids=positions).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimiser.step()
    adapted.save_pretrained(str(folder))
    return folder


def measure(model: PreTrainedModel, all_tasks: Sequence[Task]) -> Losses:
    """Bits per byte on each task's held-out lines."""
    return {task.name: bits_per_byte(model, task.heldout) for task in all_tasks}


def adapted_losses(adapter: Path, all_tasks: Sequence[Task], scale: float = 1.0) -> Losses:
    """The losses of base + scale · adapter, in float32."""
    model = load(EXAMPLE / "base")
    with torch.no_grad():
        for name, update in lt.open_adapter(adapter).low_rank.items():
            weight = model.get_parameter(name)
            weight += scale * update.load().dense().T.float()  # Conv1D stores (in, out)
    return measure(model, all_tasks)


def mean(losses: Losses) -> float:
    return sum(losses.values()) / len(losses)


@dataclass(frozen=True)
class Result:
    """One method: its losses at every scale, and the largest rank that came out."""

    method: str
    rank: int
    losses: dict[float, Losses]

    @property
    def best(self) -> float:
        """The scale with the lowest mean loss."""
        return min(self.losses, key=lambda scale: mean(self.losses[scale]))


def combine_all(
    adapters: Sequence[Path], work: Path, all_tasks: Sequence[Task]
) -> tuple[list[Result], list[str]]:
    """Every method that takes this many adapters, and the names of those that do not."""
    results, left_out = [], []
    for method in METHODS.values():
        if method.adapters[1] is not None and method.adapters[1] < len(adapters):
            left_out.append(method.name)
            continue
        asked = Combination(
            tuple(Source(path) for path in adapters),
            method.name,
            rank=None if method.keeps_rank else str(RANK * len(adapters)),
        )
        plan = plan_combine(asked, work / "combined", overwrite=True)
        report = run_combine(plan)
        losses = {scale: adapted_losses(work / "combined", all_tasks, scale) for scale in SCALES}
        results.append(Result(method.name, max(row.rank for row in report.rows), losses))
        print(f"{method.name}: {mean(losses[1.0]):.3f}", file=sys.stderr, flush=True)
    return sorted(results, key=lambda result: mean(result.losses[result.best])), left_out


def page(
    all_tasks: Sequence[Task],
    base: Losses,
    single: Sequence[Losses],
    found: tuple[list[Result], list[str]],
    compared: CompareReport,
    seconds: float,
) -> str:
    """The page. Every number in it was measured in this run."""
    results, left_out = found
    names = [task.name for task in all_tasks]
    rows = [["base", *figures(base, names)]]
    rows += [
        [f"adapter {task.name} alone", *figures(losses, names)]
        for task, losses in zip(all_tasks, single, strict=True)
    ]
    methods = [
        [
            f"`{result.method}`",
            str(result.rank),
            *figures(result.losses[1.0], names),
            f"{result.best:.2g}",
            *figures(result.losses[result.best], names),
        ]
        for result in results
    ]
    pairs = ", ".join(
        f"{names[pair.pair[0]]} and {names[pair.pair[1]]} {pair.cosine:.2f}"
        for pair in compared.pairs
    )
    assert compared.advice is not None
    sizes = "; ".join(f"{task.name}: {task.what}, {len(task.train):,} lines" for task in all_tasks)
    scales = ", ".join(f"{scale:.2g}" for scale in SCALES)
    paragraphs = [
        "# Methods, measured",
        "Made by `python benchmarks/quality_combine.py --write`; no number is typed by hand. One "
        "small case, to see that the methods do what they say: it does not rank them for other "
        "tasks.",
        f"Three LoRA adapters of rank {RANK} on every linear layer of `examples/e2e/base`, {STEPS} "
        f"steps each with PEFT, seeds of their own. Tasks: {sizes}. Bits per byte on {HELDOUT} "
        "held-out lines a task; lower is better. No meaning representation is in both the "
        "training and the held-out lines of a task.",
        table(["", *names, "mean"], rows),
        "All adapters combined at weight 1 with the methods' default parameters, to rank "
        f"{RANK * len(all_tasks)} where the method takes a rank. Left: the result as it is. Right: "
        f"multiplied by whichever of {scales} gives the lowest mean, chosen on the same lines, "
        "since methods differ in the size of what they return. Sorted by that.",
        table(["method", "rank", *names, "mean", "best scale", *names, "mean"], methods),
        f"`loratool compare` on the three: cosines {pairs}. It suggests "
        f"`{compared.advice.method}`: {compared.advice.why}.",
    ]
    if left_out:
        paragraphs.insert(6, f"Not measured, for two adapters only: {', '.join(left_out)}.")
    paragraphs.append(f"The run took {seconds / 60:.1f} minutes of processor time.")
    return "\n\n".join(paragraphs) + "\n"


def figures(losses: Losses, names: Sequence[str]) -> list[str]:
    return [*(f"{losses[name]:.3f}" for name in names), f"{mean(losses):.3f}"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description="Measure every method of combining.")
    parser.add_argument("--write", action="store_true", help=f"replace {PAGE.name}")
    write = parser.parse_args().write
    if not DATA.is_dir():
        sys.exit("needs ../shared/data (the E2E lines), which this checkout does not have")
    began = time.process_time()
    all_tasks = tasks()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapters = [
            train(task.train, work / task.name, seed) for seed, task in enumerate(all_tasks)
        ]
        base = measure(load(EXAMPLE / "base"), all_tasks)
        single = [adapted_losses(adapter, all_tasks) for adapter in adapters]
        found = combine_all(adapters, work, all_tasks)
        compared = lt.compare(adapters)
        text = page(all_tasks, base, single, found, compared, time.process_time() - began)
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
