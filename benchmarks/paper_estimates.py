"""What the LoRA paper counts, beside ``loratool estimate``."""

from __future__ import annotations

from quality_combine import table

import loratool as lt
from loratool.layouts.architectures.paper import PUBLISHED
from loratool.ops.estimate import EstimateReport

MEGA = 10**6
PAPER_FULL, PAPER_LORA = "1.2 TB", "350 GB"
PAPER_CHECKPOINT, PAPER_ADAPTER = "350 GB", "35 MB"


def sections() -> list[str]:
    """Parameters, checkpoint size and training memory of every published row."""
    ours = _estimates()
    gpt3 = ours["gpt3-175b", 4]
    full, lora = gpt3.full_training, gpt3.lora_training
    return [
        "## Parameters",
        "`loratool estimate MODEL --rank R --targets query,value`: Σ r·(in + out) over the adapted "
        "matrices. Where q, k and v are stored as one matrix (GPT-2, GPT-3), the parts asked for "
        "count, as in the authors' library (`loratool init --format loralib`).",
        _parameters_table(ours),
        _disagreements(ours),
        _fused_text(),
        "## Checkpoint size",
        "Parameters in float16.",
        _sizes_table(ours),
        f"Beside the paper's {PAPER_ADAPTER}: {gpt3.trained:,} values of two bytes are "
        f"{_size(gpt3.adapter_bytes['float16'])} or {gpt3.adapter_bytes['float16'] / 2**20:.0f} "
        "MiB.",
        "## Training memory",
        "The formula: 16-bit weights, and for each trained parameter 2 bytes of gradient and 12 of "
        "Adam (a float32 copy and two moments); activations are not counted.",
        _memory_table(ours),
        f"For GPT-3 the formula gives {_size(full.total)} for full fine-tuning where the paper "
        f"reports {PAPER_FULL}. The paper does not state what its figure holds, and the difference "
        "is left as it is: weights and gradients alone are "
        f"{_size(full.weights + full.gradients)}, with Adam's {_size(full.optimizer)} it is the "
        f"whole. With LoRA the formula's {_size(lora.total)} are nearly all weights "
        f"({_size(lora.weights)}), the paper's {PAPER_LORA}.",
    ]


def _estimates() -> dict[tuple[str, int], EstimateReport]:
    """Every published row, from its config."""
    return {
        (row.model, row.rank): lt.estimate(row.model, rank=row.rank, targets="query,value")
        for row in PUBLISHED
    }


def _parameters_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
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


def _disagreements(ours: dict[tuple[str, int], EstimateReport]) -> str:
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


def _fused_text() -> str:
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


def _sizes_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
    rows = []
    for (model, rank), report in ours.items():
        adapter = report.adapter_bytes["float16"]
        paper = (PAPER_CHECKPOINT, PAPER_ADAPTER) if (model, rank) == ("gpt3-175b", 4) else ("", "")
        rows.append(
            [
                model,
                str(rank),
                _size(report.model_bytes),
                paper[0],
                _size(adapter),
                paper[1],
                f"{report.model_bytes / adapter:,.0f} ×",
            ]
        )
    columns = ["model", "rank", "checkpoint", "paper", "adapter", "paper", "smaller"]
    return table(columns, rows)


def _memory_table(ours: dict[tuple[str, int], EstimateReport]) -> str:
    rows = []
    for (model, rank), report in ours.items():
        full, lora = report.full_training.total, report.lora_training.total
        paper = (PAPER_FULL, PAPER_LORA) if model == "gpt3-175b" else ("", "")
        rows.append(
            [
                model,
                str(rank),
                _size(full),
                paper[0],
                _size(lora),
                paper[1],
                f"{full / lora:.1f} ×",
            ]
        )
    columns = ["model", "rank", "all parameters", "paper", "LoRA", "paper", "less"]
    return table(columns, rows)


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
