"""The LoRA paper's claim of no added latency, measured."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import median
from peft import PeftModel
from quality_combine import table
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import loratool as lt

RANK = 8
ROUNDS = 25
TIMED = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 1024, "n_positions": 128}
"""The GPT-2 whose forward passes are timed."""


def sections(work: Path) -> list[str]:
    """Forward passes, timed now. work: a folder for the models."""
    return ["## Latency", _latency_text(_measure_latency(work))]


@dataclass(frozen=True)
class Latency:
    """Medians in milliseconds, medians of ratios to the base, and what was compared."""

    milliseconds: dict[str, float]
    over_base: dict[str, float]
    parameters: dict[str, int]
    modules: dict[str, int]
    same_graph: bool
    difference: float


def _measure_latency(work: Path) -> Latency:
    """Forward passes of base, merged model and adapter model, in turns."""
    torch.manual_seed(0)
    config = GPT2Config(**TIMED, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    base.save_pretrained(work / "timed")
    lt.init(work / "timed", work / "timed-start", rank=RANK, targets="c_attn")
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


def _latency_text(latency: Latency) -> str:
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
