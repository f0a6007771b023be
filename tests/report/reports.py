"""One report of every kind that has a page, made of small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import loratool as lt
from loratool.algebra.spectrum import Spectrum
from loratool.ops.inspect_adapter import UpdateRow
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft

MADE: dict[str, Callable[[Path], Any]] = {
    "pair": lambda at: lt.inspect(at / "base", at / "tuned"),
    "pair, values": lambda at: lt.inspect(at / "base", at / "tuned", level="values"),
    "pair, headers": lambda at: lt.inspect(at / "base", at / "tuned", level="headers"),
    "adapter": lambda at: lt.inspect(at / "a"),
    "adapter, values": lambda at: lt.inspect(at / "a", level="values"),
    "adapter, headers": lambda at: lt.inspect(at / "a", level="headers"),
    "adapters": lambda at: lt.inspect_adapters(at / "a", at / "b"),
    "amplification": lambda at: lt.inspect(at / "a", base=at / "base"),
    "forecast": lambda at: lt.inspect(at / "a", base=at / "base", level="values"),
    "checkpoint": lambda at: lt.inspect(at / "base"),
    "checkpoint, values": lambda at: lt.inspect(at / "base", level="values"),
    "intruders": lambda at: lt.intruders(at / "base", at / "tuned", top=4, epsilon=0.9),
    "checkpoint, spectra": lambda at: lt.inspect(at / "base", level="spectra"),
    "compare": lambda at: lt.compare([at / "a", at / "b"]),
    "compare three": lambda at: lt.compare([at / "a", at / "b", at / "c"]),
}


@cache
def report(kind: str) -> Any:
    """The report of this kind."""
    with TemporaryDirectory() as folder:
        at = Path(folder)
        state = llama_like(torch.bfloat16, layers=3)
        save_folder(state, at / "base", LLAMA)
        tuned = moved(state, size=0.05)
        still = "model.layers.1.mlp.up_proj.weight"
        save_folder({**tuned, still: state[still]}, at / "tuned", LLAMA)
        for seed, name in enumerate("abc"):
            generator = torch.Generator().manual_seed(seed)
            factors = {
                f"model.layers.{layer}.self_attn.{part}": (
                    torch.randn(2 + seed, 24, generator=generator),
                    torch.randn(rows, 2 + seed, generator=generator) * 0.01,
                )
                for layer in range(3)
                for part, rows in (("q_proj", 24), ("k_proj", 12))
            }
            save_peft(at / name, factors)
        return MADE[kind](at)


def update(
    name: str,
    values: tuple[float, ...],
    shape: tuple[int, int] = (64, 32),
    energy: float | None = None,
) -> UpdateRow:
    """An update with these singular values, and more energy than they hold where it is given."""
    total = sum(value**2 for value in values) if energy is None else energy
    spectrum = Spectrum(torch.tensor(values, dtype=torch.float64), total, shape)
    return UpdateRow(name, shape, len(values), 8.0, 2.0, 16, spectrum)


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report's JSON that its page has a row for, as the page has them: those of an
    adapter or pair together, by name."""
    return [row for rows in _groups(document) for row in sorted(rows, key=lambda row: row["name"])]


def _groups(document: dict[str, Any]) -> list[list[dict[str, Any]]]:
    if document["command"] == "compare":
        return [
            [
                {"name": module["name"], **pair}
                for module in document["modules"]
                for pair in module["pairs"]
                if pair["pair"] == wanted
            ]
            for wanted in [pair["pair"] for pair in document["pairs"]]
        ]
    if document["what"] == "adapters":
        return [one["updates"] for one in document["adapters"]]
    if document["what"] == "intruders":
        return [document["weights"]]
    if document["what"] == "pair":
        return [document["tensors" if document["level"] == "headers" else "changed"]]
    if document["what"] == "checkpoint" and document["level"] == "spectra":
        return [document["weights"]]
    if document["what"] == "checkpoint":
        found = {row["name"]: row for row in document.get("values", [])}
        return [[row | found.get(row["name"], {}) for row in document["tensors"]]]
    if document["what"] == "adapter" and document["level"] == "values":
        return [document["values"]]
    return [document["updates"]]
