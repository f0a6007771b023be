"""--json: exactly one document on stdout, whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import GPT2_CONFIG, gpt2_weights, lora_factors, write_checkpoint, write_peft
from tests.cli.failures import C_ATTN, FAILURES, extract_setup, merge_setup
from tests.cli.invoke import Ended, invoke


def the_document(ended: Ended) -> dict[str, Any]:
    """The one line on stdout. NaN and Infinity are no JSON, whatever Python thinks."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert ended.err == ""
    assert ended.out.endswith("\n")
    assert ended.out.count("\n") == 1
    assert ended.out.isascii()
    document = json.loads(ended.out, parse_constant=refuse)
    assert isinstance(document, dict)
    assert set(document) >= {"schema", "command", "version"}
    return document


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_is_a_document(name: str, tmp_path: Path) -> None:
    expected = FAILURES[name]
    arguments = expected.build(tmp_path)
    ended = invoke(*arguments, "--json")
    assert ended.code == expected.code
    document = the_document(ended)
    assert document["schema"] == "loratool/error/1"
    assert document["command"] == arguments[0]
    error = document["error"]
    assert set(error) == {"kind", "message", "details", "hint", "exit_code"}
    assert error["kind"] == expected.kind
    assert error["exit_code"] == expected.code
    assert expected.message in error["message"]
    assert isinstance(error["details"], list)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--json"], ""),
        (["merge", "--json"], "merge"),
        (["--json", "merge", "a", "b"], "merge"),
        (["merge", "a", "b", "--json", "-o", "c", "--frobnicate"], "merge"),
        (["merge", "a", "b", "--json", "-o", "c", "--scale", "much"], "merge"),
        (["merge", "a", "b", "--json", "-o", "c", "--jobs", "0"], "merge"),
        (["extract", "--json", "a"], "extract"),
        (["inspect", "--json"], "inspect"),
        (["mrege", "--json"], "mrege"),
    ],
)
def test_a_usage_error_is_a_document(arguments: list[str], command: str) -> None:
    ended = invoke(*arguments)
    assert ended.code == 2
    document = the_document(ended)
    assert document["schema"] == "loratool/error/1"
    assert document["command"] == command
    assert document["error"]["kind"] == "UsageError"
    assert document["error"]["exit_code"] == 2
    assert document["error"]["message"]


def test_results_and_plans_are_documents(tmp_path: Path) -> None:
    extraction = extract_setup(tmp_path, "--rank", "2", "--json")
    assert the_document(invoke(*extraction, "--dry-run"))["schema"] == "loratool/extract-plan/1"
    extracted = the_document(invoke(*extraction))
    assert extracted["schema"].startswith("loratool/extract/")
    seconds = extracted.pop("seconds")
    assert set(seconds) == {"read", "sketch", "orthogonalise", "certify", "write"}
    assert json.loads((tmp_path / "out" / "loratool_report.json").read_text()) == extracted
    merging = merge_setup(tmp_path, "--json")
    merging[merging.index("-o") + 1] = tmp_path / "merged"
    assert the_document(invoke(*merging, "--dry-run"))["schema"] == "loratool/merge-plan/1"
    report = tmp_path / "report.json"
    merged = the_document(invoke(*merging, "--report", report))
    assert merged["schema"].startswith("loratool/merge/")
    assert json.loads(report.read_text()) == merged
    for what in (["base"], ["adapter"], ["base", "tuned"]):
        paths = [tmp_path / name for name in what]
        document = the_document(invoke("inspect", *paths, "--json"))
        assert document["schema"].startswith("loratool/inspect/")


def test_reports_hold_no_absolute_paths(tmp_path: Path) -> None:
    """A push publishes them."""
    ended = invoke(*extract_setup(tmp_path, "--rank", "2", "--json"))
    the_document(ended)
    for text in (ended.out, (tmp_path / "out" / "loratool_report.json").read_text()):
        assert str(tmp_path) not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_lacks(value: float, tmp_path: Path) -> None:
    """Inspecting a broken adapter still gives JSON: an error, or null, never a bare NaN."""
    factors = lora_factors(C_ATTN, 24, 8, 2)
    next(iter(factors.values()))[0, 0] = value
    write_peft(tmp_path / "adapter", factors, fan_in_fan_out=True)
    the_document(invoke("inspect", tmp_path / "adapter", "--json"))


def test_a_base_of_zeros(tmp_path: Path) -> None:
    """Relative change of nothing is no number."""
    weights = gpt2_weights()
    write_checkpoint(tmp_path / "tuned", weights, GPT2_CONFIG)
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    write_checkpoint(tmp_path / "base", zeros, GPT2_CONFIG)
    the_document(invoke("inspect", tmp_path / "base", tmp_path / "tuned", "--json"))
    arguments = ["extract", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out"]
    the_document(invoke(*arguments, "--rank", "2", "--json"))


def test_an_end_to_end_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loratool", "inspect", str(tmp_path / "gone"), "--json"],
        capture_output=True,
        text=True,
    )
    document = the_document(Ended(done.returncode, done.stdout, done.stderr))
    assert done.returncode == 3 == document["error"]["exit_code"]
