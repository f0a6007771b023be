"""Measure a byte-level checkpoint of this example: bits per byte on the held-out lines.

    python evaluate.py tuned
    python evaluate.py path/to/a/merged/model --heldout heldout.txt

Lower is better. Every line is predicted on its own, from the start byte 0 on, and every byte
of the line counts, its final newline included. The forward pass is float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

START = 0
BATCH = 20
HELDOUT = Path(__file__).resolve().parent / "heldout.txt"


def load(folder: str | Path) -> PreTrainedModel:
    """Load a checkpoint folder in float32, without warnings or progress bars."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(PreTrainedModel, model)


def read_lines(path: str | Path) -> list[str]:
    """Read the non-empty lines of a UTF-8 file, only the newline removed."""
    text = Path(path).read_bytes().decode("utf-8")
    return [line for line in text.split("\n") if line]


@torch.inference_mode()
def bits_per_byte(model: str | Path | PreTrainedModel, lines: Sequence[str]) -> float:
    """Average of -log2 p over all bytes of the lines, each line predicted independently.

    The model is a checkpoint folder or a loaded model, which is used as it is: pass a float32
    one for comparable numbers. A line that does not fit the model's context is an error.
    """
    loaded = load(model) if isinstance(model, str | Path) else model
    encoded = sorted(((line.removesuffix("\n") + "\n").encode() for line in lines), key=len)
    if not encoded:
        raise ValueError("no lines to evaluate")
    context = int(loaded.config.max_position_embeddings)
    if len(encoded[-1]) > context:
        raise ValueError(f"a line has {len(encoded[-1])} bytes; the model's context is {context}")
    was_training = loaded.training
    loaded.train(False)
    try:
        nats = sum(
            _nats(loaded, encoded[first : first + BATCH]) for first in range(0, len(encoded), BATCH)
        )
    finally:
        loaded.train(was_training)
    return nats / math.log(2) / sum(map(len, encoded))


def _nats(model: PreTrainedModel, lines: Sequence[bytes]) -> float:
    """Sum of -ln p over all bytes of one batch of lines."""
    width = max(map(len, lines))
    inputs = torch.full((len(lines), width), START)
    targets = torch.full((len(lines), width), -100)  # -100: padding, left out of the sum
    mask = torch.zeros((len(lines), width), dtype=torch.long)
    for row, line in enumerate(lines):
        targets[row, : len(line)] = torch.tensor(list(line))
        inputs[row, 1 : len(line)] = targets[row, : len(line) - 1]
        mask[row, : len(line)] = 1
    device = model.device
    logits = model(input_ids=inputs.to(device), attention_mask=mask.to(device)).logits
    scores = functional.log_softmax(logits.float(), dim=-1).cpu()
    losses = functional.nll_loss(
        scores.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return float(losses.double().sum())


def main() -> None:
    """Print the number for one checkpoint folder."""
    parser = argparse.ArgumentParser(description="Bits per byte of a checkpoint on held-out lines.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="lines to measure on")
    arguments = parser.parse_args()
    print(f"{bits_per_byte(arguments.model, read_lines(arguments.heldout)):.4f}")


if __name__ == "__main__":
    main()
