"""Names are sorted as people count; documents keep the order of the files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.invoke import invoke
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft

LAYERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("natural")
    state = llama_like(torch.bfloat16, layers=len(LAYERS))
    save_folder(state, at / "base", LLAMA)
    save_folder(moved(state, size=0.05), at / "tuned", LLAMA)
    for seed, name in enumerate(("a2", "a10", "a1")):
        random = torch.Generator().manual_seed(seed)
        factors = {
            f"model.layers.{layer}.self_attn.q_proj": (
                torch.randn(2, 24, generator=random),
                torch.randn(24, 2, generator=random) * 0.01,
            )
            for layer in LAYERS
        }
        save_peft(at / name, factors)
    return at


COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "checkpoint": lambda at: ("inspect", at / "base"),
    "checkpoint, spectra": lambda at: ("inspect", at / "base", "--level", "spectra"),
    "adapter": lambda at: ("inspect", at / "a1"),
    "pair": lambda at: ("inspect", at / "base", at / "tuned", "--sort", "name"),
    "amplification": lambda at: ("inspect", at / "a1", "--base", at / "base"),
    "forecast": lambda at: ("inspect", at / "a1", "--base", at / "base", "--level", "values"),
    "intruders": lambda at: (
        *("inspect", at / "base", at / "tuned", "--intruders", "--top", "2", "--sort", "name"),
    ),
    "compare": lambda at: ("compare", at / "a1", at / "a2"),
}


def layers(names: list[str]) -> list[int]:
    """Of one kind of module, so that every layer is there once."""
    return [int(name.split(".")[2]) for name in names if "q_proj" in name]


@pytest.mark.parametrize("kind", COMMANDS)
def test_tables_pages_and_csv_count(kind: str, made: Path, tmp_path: Path) -> None:
    command = COMMANDS[kind](made)
    out = invoke(*command, "-v").out
    shown = layers(re.findall(r"^  (model[.]layers[.]\S*)", out, re.MULTILINE))
    assert shown
    assert shown == LAYERS * (len(shown) // len(LAYERS))
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    files = ("--html", page) if kind == "compare" else ("--html", page, "--csv", table)
    ended = invoke(*command, *files, "--json")
    assert ended.code == 0, ended.err
    (data,) = re.findall(r'id="page-data">(.*?)</script>', page.read_text())
    assert layers(json.loads(data)["names"]) == LAYERS
    if table.exists():
        rows = list(csv.DictReader(table.read_text().splitlines()))
        assert layers([row["name"] for row in rows]) == LAYERS
        found = layers(re.findall(r'"name": "(model[^"]*)"', ended.out))
        assert set(found) == set(LAYERS)


def test_adapters_are_listed_as_they_count(made: Path) -> None:
    names = [entry["name"] for entry in json.loads(invoke("list", made, "--json").out)["entries"]]
    assert names == ["a1", "a2", "a10", "base", "tuned"]
