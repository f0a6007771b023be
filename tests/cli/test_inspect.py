"""``loratool inspect``: its options, files and colours."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from loratool.cli.main import main
from tests.cli.invoke import invoke
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    state = llama_like(torch.bfloat16, layers=3)
    base = save_folder(state, tmp_path / "base", LLAMA)
    return [base, save_folder(moved(state, size=0.05), tmp_path / "tuned", LLAMA)]


def test_base_is_another_way_to_name_a_pair(pair: list[Path]) -> None:
    plain = invoke("inspect", *pair)
    named = invoke("inspect", pair[1], "--base", pair[0])
    said = "the pair base and tuned, as inspect BASE TUNED shows it\n"
    assert named.out == said + plain.out
    assert invoke("inspect", *pair, "--base", pair[0]).code == 2


def test_the_table_is_sorted_as_asked(pair: list[Path]) -> None:
    def modules(sort: str) -> list[str]:
        out = invoke("inspect", *pair, "--sort", sort).out
        return re.findall(r"^  (\S*model\S*|lm_head)", out, re.MULTILINE)

    names = modules("name")
    assert names == sorted(names)
    assert modules("energy") != names
    assert sorted(modules("change")) == names
    assert invoke("inspect", pair[0], "--sort", "change").code == 2


def test_a_line_per_tensor_as_csv(pair: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "changes.csv"
    ended = invoke("inspect", *pair, "--csv", file, "--only", "mlp", "--json")
    changed = json.loads(ended.out)["changed"]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["name"] for row in rows] == [row["name"] for row in changed]
    assert all(".mlp." in row["name"] for row in rows)
    assert [float(row["delta_norm"]) for row in rows] == [row["delta_norm"] for row in changed]
    assert json.loads(rows[0]["rank_for"]) == changed[0]["rank_for"]
    invoke("inspect", pair[0], "--level", "values", "--csv", file)
    assert {row["nan"] for row in csv.DictReader(file.read_text().splitlines())} == {"0"}
    assert invoke("inspect", *pair, "--csv", pair[0] / "config.json" / "x.csv").code == 5


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "no_colour", "plain"),
    [
        ("xterm-256color", "", False),
        ("xterm-256color", "1", True),
        ("xterm-16color", "", True),
        ("dumb", "", True),
    ],
)
def test_the_map_is_coloured_on_terminals_that_have_colours(
    kind: str, no_colour: str, plain: bool, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", kind)
    for name in ("FORCE_COLOR", "NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", no_colour)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        main(["inspect", *map(str, pair), "--level", "values"])
    coloured = re.findall(r"\x1b\[48;5;\d+m", terminal.getvalue())
    assert bool(coloured) != plain
    assert "\x1b[10" not in terminal.getvalue()
    assert ("█" in terminal.getvalue()) == plain or not plain


def test_many_layers_share_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    state = llama_like(torch.float32, layers=60)
    base = save_folder(state, tmp_path / "base", LLAMA)
    state["model.layers.41.self_attn.q_proj.weight"] = (
        state["model.layers.41.self_attn.q_proj.weight"] + 1
    )
    state["model.layers.7.self_attn.q_proj.weight"] = (
        state["model.layers.7.self_attn.q_proj.weight"] * 1.001
    )
    tuned = save_folder(state, tmp_path / "tuned", LLAMA)
    out = invoke("inspect", base, tuned, "--level", "values", "-v").out
    assert "(layers 0 to 59, 3 layers to a block)" in out
    (row,) = [line for line in out.splitlines() if "#" in line and "q_proj" in line]
    assert row == "..attn.q_proj ..-.........." + "#......"


def test_the_map_tells_a_small_change_and_one_from_zero_from_none(tmp_path: Path) -> None:
    state = llama_like(torch.float32, layers=4)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
    state[names[3]] = torch.zeros(24, 24)
    base = save_folder(state, tmp_path / "base", LLAMA)
    state[names[1]] = state[names[1]] * 1.001
    state[names[2]] = state[names[2]] * 2
    state[names[3]] = torch.ones(24, 24)
    tuned = save_folder(state, tmp_path / "tuned", LLAMA)
    out = invoke("inspect", base, tuned, "--level", "values").out
    assert "self_attn.q_proj ....----########\n" in out


def test_zero_b_is_said(tmp_path: Path) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 24), torch.zeros(24, 2))}
    adapter = save_peft(tmp_path / "a", factors)
    out = invoke("inspect", adapter, "--level", "values").out
    assert "zero B, so that nothing changes: model.layers.0.self_attn.q_proj.weight" in out
    assert "all zero" in out


def test_adapters_side_by_side(tmp_path: Path) -> None:
    """Each as it is on its own; the norm of all updates is that of the dense change."""
    paths, norms = [], []
    for seed, rank in ((0, 2), (1, 5)):
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            torch.randn(rank, 24, generator=generator),
            torch.randn(24, rank, generator=generator),
        )
        modules = {f"model.layers.{layer}.self_attn.q_proj": (a, b) for layer in range(2)}
        modules = {name: (x.clone(), y.clone()) for name, (x, y) in modules.items()}
        paths.append(save_peft(tmp_path / str(seed), modules, lora_alpha=4))
        norms.append(float((2**0.5 * 4 / rank * b.double() @ a.double()).norm()))
    document = json.loads(invoke("inspect", *paths, "--json").out)
    assert document["what"] == "adapters"
    for path, norm, one in zip(paths, norms, document["adapters"], strict=True):
        alone = json.loads(invoke("inspect", path, "--json").out)
        assert one == {key: alone[key] for key in one}
        total = sum(row["norm"] ** 2 for row in one["updates"]) ** 0.5
        assert total == pytest.approx(norm, rel=1e-9)
        assert f"{norm:.3g}" in invoke("inspect", *paths).out
    assert invoke("inspect", *paths, "--exact").code == 2
    assert invoke("inspect", *paths, tmp_path).code == 3
    again = tmp_path / "again" / "0"
    shutil.copytree(paths[0], again)
    document = json.loads(invoke("inspect", *paths, again, "--json").out)
    assert [one["name"] for one in document["adapters"]] == [str(paths[0]), "1", str(again)]
