"""loratool combine and loratool resize, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import snapshot
from tests.cli.invoke import invoke
from tests.cli.test_json import the_document
from tests.ops.adapters import adapter, updates


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with two adapters."""
    adapter(tmp_path / "a", 4)
    adapter(tmp_path / "b", 2, 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_weights_behind_a_colon(here: Path) -> None:
    ended = invoke("combine", "a:0.5", "b:-2", "-o", "out", "--method", "cat")
    assert (ended.code, ended.err) == (0, "")
    for text in ("cat of 2 adapters", "model.layers.*.mlp.up_proj", "4 2", "relative error"):
        assert text in ended.out
    one, two, both = (updates(here / name) for name in ("a", "b", "out"))
    for name, value in both.items():
        assert float((value - 0.5 * one[name] + 2 * two[name]).norm()) < 1e-5 * float(value.norm())


def test_a_path_with_a_colon_is_a_path(here: Path) -> None:
    (here / "a").rename(here / "a:0.5")
    assert invoke("combine", "a:0.5", "b", "-o", "out", "--json").code == 0
    report = json.loads((here / "out" / "loratool_report.json").read_text())
    assert [(row["name"], row["weight"]) for row in report["adapters"]] == [("a:0.5", 1), ("b", 1)]


def test_parameters_are_options(here: Path) -> None:
    ended = invoke(
        "combine", "a", "b", "-o", "out", "--method", "ties", "--density", "0.3", "--no-normalize",
        "--majority", "frequency", "--lambda", "2", "--json",
    )  # fmt: skip
    document = the_document(ended)
    assert document["schema"] == "loratool/combine/1"
    assert document["parameters"] == {
        "density": 0.3, "lambda": 2.0, "normalize": False, "majority": "frequency",
    }  # fmt: skip
    assert str(here) not in ended.out


def test_every_weight_with_v(here: Path) -> None:
    out = invoke("combine", "a", "b", "-o", "out", "-v").out
    assert out.count("model.layers.0.mlp.up_proj.weight") == 1
    assert "every weight" in out


@pytest.mark.parametrize("command", [["combine", "a", "b"], ["resize", "a", "--rank", "2"]])
def test_a_dry_run_writes_nothing(here: Path, command: list[str]) -> None:
    before = snapshot(here)
    ended = invoke(*command, "-o", "out", "--dry-run")
    assert ended.code == 0
    assert ended.out.startswith("would ")
    document = the_document(invoke(*command, "-o", "out", "--dry-run", "--json"))
    assert document["schema"] == f"loratool/{command[0]}-plan/1"
    assert snapshot(here) == before


def test_resize(here: Path) -> None:
    report = here / "report.json"
    ended = invoke("resize", "a", "-o", "out", "--rank", "energy:0.8", "--report", report)
    assert (ended.code, ended.err) == (0, "")
    assert "rank energy:0.8" in ended.out
    assert json.loads(report.read_text())["schema"] == "loratool/resize/1"
    assert the_document(invoke("resize", "a", "-o", "two", "--rank", "2", "--json"))["rank"] == "2"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["combine", "-o", "out"], 2, "Missing argument"),
        (["combine", "a", "gone", "-o", "out"], 3, "gone: no such file or folder"),
        (["combine", "a", "b:nan", "-o", "out"], 2, "not a finite number"),
        (["combine", "a", "b:x", "-o", "out"], 3, "b:x: no such file or folder"),
        (["combine", "a", "b", "-o", "out", "--method", "tied"], 2, "unknown method 'tied'"),
        (["combine", "a", "b", "-o", "out", "--gamma", "0.5"], 2, "svd takes no gamma"),
        (["combine", "a", "b", "-o", "out", "--rank", "0"], 2, "rank '0'"),
        (["combine", "a", "a:-1", "-o", "out"], 4, "zero everywhere"),
        (["combine", "a", "b", "-o", "a"], 5, "is one of the inputs"),
        (["combine", "a", "b", "-o", "out", "--alpha", "3"], 2, "stores its own alpha"),
        (["combine", "a", "b", "-o", "out", "--weight", "5@mlp=1"], 2, "names no adapter"),
        (["resize", "a", "-o", "out"], 2, "Missing option '--rank'"),
        (["resize", "gone", "-o", "out", "--rank", "2"], 3, "gone: no such file or folder"),
        (["resize", "a", "-o", "out", "--rank", "2", "--profile", "ollama"], 2, "unknown profile"),
        (["resize", "a", "-o", "b", "--rank", "2"], 5, "exists already"),
    ],
)
def test_failures(here: Path, arguments: list[str], code: int, message: str) -> None:
    before = snapshot(here)
    ended = invoke(*arguments)
    assert ended.code == code
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert snapshot(here) == before
