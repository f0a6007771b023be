"""Every refusal: its exit code, one clear message on stderr, nothing written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from loratool import errors
from loratool.cli.errors import BUG, EXIT_CODES, exit_code
from tests.builders import snapshot
from tests.cli.failures import FAILURES, extract_setup, merge_setup
from tests.cli.invoke import invoke


@pytest.mark.parametrize("name", FAILURES)
def test_a_refusal(name: str, tmp_path: Path) -> None:
    expected = FAILURES[name]
    arguments = expected.build(tmp_path)
    before = snapshot(tmp_path)
    ended = invoke(*arguments)
    assert ended.code == expected.code, ended.err
    assert ended.out == ""
    first, *rest = ended.err.splitlines()
    assert first.startswith("error: ")
    assert expected.message in first
    assert not [line for line in rest if not line.startswith("  ")], "one message"
    assert "Traceback" not in ended.err
    assert "bug in loratool" not in ended.err
    assert snapshot(tmp_path) == before, "nothing is written, nothing is lost"


@pytest.mark.parametrize("name", ["a truncated adapter", "--rank 0", "an output that exists"])
def test_debug_adds_the_traceback_and_keeps_the_code(name: str, tmp_path: Path) -> None:
    expected = FAILURES[name]
    ended = invoke(*expected.build(tmp_path), "--debug")
    assert ended.code == expected.code
    assert "Traceback" in ended.err
    assert [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert expected.message in ended.err


@pytest.mark.parametrize("setup", [merge_setup, extract_setup], ids=["merge", "extract"])
def test_the_setups_themselves_work(setup: object, tmp_path: Path) -> None:
    """Otherwise every refusal above might be for another reason."""
    assert callable(setup)
    arguments = setup(tmp_path, "--rank", "2") if setup is extract_setup else setup(tmp_path)
    ended = invoke(*arguments)
    assert ended.code == 0, ended.err
    assert ended.err == "" or ended.err.startswith("note: ")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("setup", [merge_setup, extract_setup], ids=["merge", "extract"])
def test_a_dry_run_writes_nothing(setup: object, tmp_path: Path) -> None:
    assert callable(setup)
    arguments = setup(tmp_path, "--rank", "2") if setup is extract_setup else setup(tmp_path)
    before = snapshot(tmp_path)
    ended = invoke(*arguments, "--dry-run")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("would ")
    assert snapshot(tmp_path) == before


def test_quiet_says_nothing_but_errors(tmp_path: Path) -> None:
    ended = invoke(*merge_setup(tmp_path), "-q")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    ended = invoke(*merge_setup(tmp_path), "-q")
    assert ended.code == 5
    assert "exists already" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage:"),
        (["mrege"], "No such command 'mrege'"),
        (["merge"], "Missing argument 'BASE'"),
        (["merge", "a", "b"], "no output is named"),
        (["merge", "a", "b", "-o", "c", "--frobnicate"], "--frobnicate"),
        (["merge", "a", "b", "-o", "c", "--scale", "much"], "'much' is not a valid float"),
        (["recover", "a", "--back", "--forward"], "choose one"),
        (["merge", "a", "b", "-o", "c", "--scale", "nan"], "not a finite number"),
        (["merge", "a", "b", "-o", "c", "--scale", "inf"], "not a finite number"),
        (["merge", "a", "b", "-o", "c", "--alpha", "nan"], "not a finite number"),
        (["merge", "a", "b", "-o", "c", "--jobs", "0"], "0 is not in the range"),
        (["extract", "a", "b", "-o", "c", "--seed", "x"], "'x' is not a valid integer"),
        (["extract", "a", "b", "-o", "c", "--svd", "fast"], "'fast' is not one of"),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = invoke(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert snapshot(tmp_path) == {}


def test_every_kind_of_error_has_its_code() -> None:
    branches = {kind: code for kind, code, _ in EXIT_CODES}
    assert set(branches) == set(errors.LoratoolError.__subclasses__())
    assert len(set(branches.values())) == len(branches)
    for kind, code in branches.items():
        for one in (kind, *kind.__subclasses__()):
            assert exit_code(one("x")) == code
    assert exit_code(errors.LoratoolError("x")) == BUG == 70


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = invoke(*merge_setup(tmp_path), "--report", tmp_path / "file" / "report.json")
    assert ended.code == 5
    assert f"{tmp_path / 'file'} is no folder" in ended.err
    assert not (tmp_path / "out").exists()
    ended = invoke(*merge_setup(tmp_path), "--report", tmp_path / "out")
    assert ended.code == 5
    assert "out: is the output itself" in ended.err
    assert not (tmp_path / "out").exists()
    ended = invoke("inspect", tmp_path / "base", "--csv", tmp_path / "file" / "table.csv")
    assert (ended.code, ended.out) == (5, "")


def test_folders_of_a_report_are_made(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    arguments = ("--report", "new/one/report.json", "--csv", "new/two/table.csv", "--json")
    with contextlib.chdir(tmp_path):
        ended = invoke("list", "list", *arguments)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "new" / "one" / "report.json").read_text())
    assert (tmp_path / "new" / "two" / "table.csv").exists()
