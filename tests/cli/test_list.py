"""``loratool list`` as its user sees it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from tests.cli.invoke import invoke
from tests.ops.builders import LLAMA, llama_like, save_folder
from tests.ops.test_catalogue import small_adapter


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save_folder(llama_like(), tmp_path / "base", LLAMA)
    for name, seed in (("math", 0), ("code", 1)):
        small_adapter(tmp_path / "adapters" / name, seed=seed, lora_alpha=8)
    broken = small_adapter(tmp_path / "adapters" / "broken") / "adapter_model.safetensors"
    os.truncate(broken, broken.stat().st_size - 5)
    return tmp_path


def test_problems_are_counted_and_said_when_asked(models: Path) -> None:
    short = invoke("list", models)
    assert short.code == 0
    assert "1 entry with a problem: -v says which" in short.out
    assert "broken" in short.out
    assert "promises" not in short.out
    assert "is truncated: its header promises" in invoke("list", models, "-v").out


def test_candidates_are_marked_and_explained(models: Path) -> None:
    out = invoke("list", models).out
    assert out.count("?1") == 2
    assert "--checksum reads them and tells" in out
    sure = invoke("list", models, "--checksum").out
    assert "?1" not in sure
    assert sure.count("~1") == 2


def test_the_document(models: Path) -> None:
    ended = invoke("list", models, "--kind", "adapter", "--sort", "health", "--json")
    document = json.loads(ended.out)
    assert document["schema"] == "loratool/list/1"
    assert document["entries"][0]["name"] == "adapters/broken"
    assert {entry["kind"] for entry in document["entries"]} == {"adapter"}
    (group,) = document["alike"]
    assert group["likeness"] == "candidate"
    assert [document["entries"][index]["name"] for index in group["entries"]] == [
        "adapters/code",
        "adapters/math",
    ]


def test_nothing_found_is_an_answer(tmp_path: Path) -> None:
    ended = invoke("list", tmp_path)
    assert (ended.code, ended.out) == (0, "no adapter or checkpoint found\n")
    assert invoke("list", tmp_path / "nowhere").code == 3
    assert invoke("list", tmp_path, "--sort", "colour").code == 2


def test_a_line_per_entry_as_csv(tmp_path: Path) -> None:
    save_folder(llama_like(), tmp_path / "models" / "base", LLAMA)
    file = tmp_path / "found.csv"
    document = json.loads(invoke("list", tmp_path / "models", "--csv", file, "--json").out)
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["name"] for row in rows] == [entry["name"] for entry in document["entries"]]
    assert [int(row["bytes"]) for row in rows] == [e["bytes"] for e in document["entries"]]
