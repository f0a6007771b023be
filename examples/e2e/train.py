"""Make the example pair of checkpoints: a byte-level GPT-2 and its full fine-tuning.

    python train.py base -o base
    python train.py tuned --base base --data e2e_valid.txt -o tuned
    python train.py heldout --data e2e_test.txt -o heldout.txt

``base`` reads only text that ships with Python itself: the language reference bundled for
``help()`` and the docstrings of the standard library. ``tuned`` continues from the saved base
on lines of the E2E data set, ``meaning representation||reference``, and updates every
parameter. ``heldout`` picks the lines that ``evaluate.py`` measures.

Tokens are bytes, so there is no tokenizer. Byte 0 starts a document; it never occurs in one.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

START = b"\0"
N_POSITIONS = 384  # also the longest line, without its start byte, that can be evaluated
WIDTH = 160
BYTES_PER_STEP = 1536
HELDOUT_LINES = 300

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
SHORTEST_DOCSTRING = 40
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Schedule:
    """Everything that decides a training run besides the model and the text.

    Every row length gets an equal share of the steps, in order. Short rows come first because
    a small model learns to look back a few bytes much sooner on them; they lie at random places
    of the context, so that all its positions learn together.
    """

    steps: int
    row_lengths: tuple[int, ...]
    peak_rate: float
    warmup: int
    weight_decay: float
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to a tenth of the peak."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


BASE = Schedule(3000, (64, 128, N_POSITIONS), 2.5e-3, 100, weight_decay=0.1, seed=1)
TUNED = Schedule(1100, (N_POSITIONS,), 1e-3, 50, weight_decay=0.0, seed=2)


def python_documentation() -> list[str]:
    """List the help topics and the docstrings of the running Python, in a fixed order."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            texts.extend(docstrings(path))
    return [plain(text) for text in dict.fromkeys(texts)]


def docstrings(path: Path) -> list[str]:
    """Collect the docstrings of one source file; none if the file is not valid Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [text for text in found if text is not None and len(text) >= SHORTEST_DOCSTRING]


def plain(text: str) -> str:
    """Drop blanks at line ends, blank lines around the text, and the byte that starts documents."""
    lines = text.replace(START.decode(), "").strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def split_document(text: str, length: int) -> list[bytes]:
    """Cut a text into runs of whole lines of at most `length` bytes; longer lines stay whole."""
    pieces: list[bytes] = []
    piece = b""
    for line in text.split("\n"):
        encoded = f"{line}\n".encode("utf-8", "replace")
        if piece and len(piece) + len(encoded) > length:
            pieces.append(piece)
            piece = b""
        piece += encoded
    return [*pieces, piece]


def read_lines(path: Path) -> list[str]:
    """Read the non-empty lines of a UTF-8 file, only the newline removed."""
    return [line for line in path.read_bytes().decode("utf-8").split("\n") if line]


def packed_rows(texts: Sequence[str], length: int, seed: int) -> Iterator[bytes]:
    """Endless rows of length + 1 bytes, each of which begins at the start of a document.

    The documents are shuffled, then laid end to end until a row is full; what does not fit is
    dropped. So a document in first place sees exactly what ``evaluate.py`` shows the model.
    """
    shuffler = random.Random(seed)
    documents = [piece for text in texts for piece in split_document(text, length)]
    row = bytearray()
    while True:
        shuffler.shuffle(documents)
        for document in documents:
            row += START + document
            if len(row) > length:
                yield bytes(row[: length + 1])
                row.clear()


def batches(texts: Sequence[str], schedule: Schedule) -> Iterator[torch.Tensor]:
    """One (rows, length + 1) tensor of bytes per step."""
    for length in schedule.row_lengths:
        rows = packed_rows(texts, length, schedule.seed)
        for _ in range(schedule.steps // len(schedule.row_lengths)):
            yield torch.tensor([list(next(rows)) for _ in range(BYTES_PER_STEP // length)])


def sinusoids(count: int, width: int) -> torch.Tensor:
    """Position vectors of "Attention Is All You Need", section 3.5, sines before cosines."""
    angles = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def new_model(seed: int) -> GPT2LMHeadModel:
    """Build an untrained byte-level GPT-2 with a tied head; positions begin as sinusoids."""
    torch.manual_seed(seed)
    scale = WIDTH**-0.5
    config = GPT2Config(
        vocab_size=256,
        n_positions=N_POSITIONS,
        n_embd=WIDTH,
        n_layer=4,
        n_head=5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=scale,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(scale * sinusoids(N_POSITIONS, WIDTH))
    return model


def train(model: PreTrainedModel, texts: Sequence[str], schedule: Schedule) -> None:
    """Update every parameter of the model in float32; prints the loss in bits per byte."""
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    text_bytes = sum(len(text.encode("utf-8", "replace")) + 1 for text in texts)
    print(f"{len(texts)} texts, {text_bytes} bytes; {size} parameters", flush=True)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.98))
    began = time.monotonic()
    losses: list[float] = []
    torch.manual_seed(schedule.seed)
    model.train()
    for step, batch in enumerate(batches(texts, schedule)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        length = batch.shape[1] - 1
        starts = torch.randint(N_POSITIONS - length + 1, (len(batch), 1))
        logits = model(input_ids=batch[:, :-1], position_ids=starts + torch.arange(length)).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if (step + 1) % 100 == 0:
            bits, minutes = sum(losses) / len(losses), (time.monotonic() - began) / 60
            print(f"step {step + 1}: {bits:.3f} bits/byte, {minutes:.1f} minutes", flush=True)
            losses.clear()


def pick_heldout(lines: Sequence[str], count: int) -> list[str]:
    """Evenly spaced lines, of as many meaning representations, that fit the context."""
    first_reference: dict[str, str] = {}
    for line in lines:
        if len(line.encode()) + 1 <= N_POSITIONS:
            first_reference.setdefault(line.partition("||")[0], line)
    candidates = list(first_reference.values())
    return [candidates[index * len(candidates) // count] for index in range(count)]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Make the example pair of checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="train from scratch on Python's documentation")
    tuned = commands.add_parser("tuned", help="fine-tune every parameter on E2E lines")
    heldout = commands.add_parser("heldout", help="pick the lines to evaluate on")
    tuned.add_argument("--base", type=Path, required=True, help="folder of the base checkpoint")
    tuned.add_argument("--data", type=Path, required=True, help="E2E lines to train on")
    heldout.add_argument("--data", type=Path, required=True, help="E2E lines to pick from")
    for command in (base, tuned, heldout):
        command.add_argument("-o", "--output", type=Path, required=True, help="what to write")
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    arguments = parse_arguments()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if arguments.command == "heldout":
        lines = pick_heldout(read_lines(arguments.data), HELDOUT_LINES)
        arguments.output.write_bytes("".join(f"{line}\n" for line in lines).encode())
    elif arguments.command == "base":
        model: PreTrainedModel = new_model(BASE.seed)
        train(model, python_documentation(), BASE)
        model.bfloat16().save_pretrained(arguments.output)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
        train(model, read_lines(arguments.data), TUNED)
        model.bfloat16().save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
