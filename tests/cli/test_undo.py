"""unmerge, swap and verify on the command line: what they say, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.builders import snapshot
from tests.cli.invoke import Ended, invoke
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors

FACTORS = {Q0: factors(24, 24), DOWN1: factors(24, 40)}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, adapter, other, and merged with a receipt; the current folder."""
    monkeypatch.chdir(tmp_path)
    save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    save_peft(tmp_path / "adapter", FACTORS, lora_alpha=16)
    save_peft(tmp_path / "other", {Q0: factors(24, 24, seed=3)})
    assert invoke("merge", "base", "adapter:0.5", "-o", "merged", "--receipt", "-q").code == 0
    return tmp_path


def document(ended: Ended) -> dict[str, object]:
    assert ended.err == ""
    found = json.loads(ended.out)
    assert isinstance(found, dict)
    return found


def test_merge_says_once_what_a_receipt_would_cost_or_did(made: Path) -> None:
    ended = invoke("merge", "base", "adapter", "-o", "plain")
    assert ended.out.count("merge with --receipt") == 1
    ended = invoke("merge", "base", "adapter", "-o", "elsewhere", "--receipt=r.safetensors")
    assert "receipt: r.safetensors, " in ended.out
    assert (made / "r.safetensors").is_file()
    assert not list((made / "elsewhere").glob("loratool_receipt*"))
    ended = invoke("merge", "base", "adapter", "-o", "x", "--receipt", "--dry-run")
    assert "receipt: x/loratool_receipt.safetensors, about " in ended.out
    assert not (made / "x").exists()
    ended = invoke("merge", "base", "adapter", "--in-place", "--receipt")
    assert (ended.code, ended.err.splitlines()[0]) == (
        2,
        "error: --in-place does not go with --receipt",
    )


def test_unmerge(made: Path) -> None:
    before = snapshot(made)
    ended = invoke("unmerge", "merged", "adapter:0.5", "-o", "back", "--dry-run")
    assert ended.out.startswith("would restore 2 tensors exactly")
    assert snapshot(made) == before
    plan = document(invoke("unmerge", "merged", "adapter:0.5", "-o", "b", "--dry-run", "--json"))
    assert plan["schema"] == "loratool/unmerge-plan/1"
    ended = invoke("unmerge", "merged", "adapter:0.5", "-o", "back")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("back is the base, bit for bit: 2 of 13 tensors")
    assert document(invoke("unmerge", "merged", "adapter:0.5", "-o", "json", "--json"))["exact"]
    assert invoke("unmerge", "merged", "adapter:0.5", "-o", "back").code == 5
    assert invoke("unmerge", "merged", "adapter:0.5", "-o", "back", "--overwrite").code == 0
    (made / "merged" / "loratool_receipt.safetensors").unlink()
    ended = invoke("unmerge", "merged", "adapter:0.5", "-o", "near")
    assert ended.code == 0
    assert "without a receipt" in ended.out
    assert "need not be the base's" in ended.out


def test_swap(made: Path) -> None:
    words = ("swap", "merged", "--remove", "adapter:0.5", "--add", "other:2", "-o", "swapped")
    before = snapshot(made)
    assert invoke(*words, "--dry-run").out.startswith("would restore 2 tensors and change 1")
    assert document(invoke(*words, "--dry-run", "--json"))["schema"] == "loratool/swap-plan/1"
    assert snapshot(made) == before
    ended = invoke(*words)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("swapped into swapped: 2 of 13 tensors restored, 1 changed")
    assert "bit per changed weight" in ended.out
    assert document(invoke(*words, "--overwrite", "--json"))["schema"] == "loratool/swap/1"
    assert invoke("unmerge", "swapped", "other:2", "-o", "back", "-q").code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("unmerge", "merged", "adapter", "-o", "x"), 4, "was merged with weight 0.5"),
        (("unmerge", "merged", "other:0.5", "-o", "x"), 4, "is not the adapter 'adapter'"),
        (("unmerge", "merged", "gone", "-o", "x"), 3, "gone: no such file or folder"),
        (("unmerge", "base", "adapter", "-o", "x", "--receipt", "r"), 3, "no such receipt"),
        (("unmerge", "merged", "adapter:0.5", "-o", "merged"), 5, "is one of the inputs"),
        (("swap", "base", "--remove", "adapter", "--add", "other", "-o", "x"), 3, "no receipt"),
        (("verify", "merged", "--adapter", "adapter"), 2, "without --base"),
        (("verify", "merged", "--base", "base"), 2, "no adapter is named"),
        (("verify", "adapter", "--tuned", "base"), 2, "--tuned needs --base"),
        (("verify", "adapter", "--tuned", "base", "--fast"), 2, "--tuned asks whether"),
        (("verify", "base", "--base", "base", "--adapter", "gone"), 3, "no such file or folder"),
    ],
)
def test_refusals(words: tuple[str, ...], code: int, message: str, made: Path) -> None:
    before = snapshot(made)
    ended = invoke(*words)
    first, *rest = ended.err.splitlines()
    assert (ended.code, ended.out) == (code, "")
    assert first.startswith("error: ")
    assert message in first
    assert not [line for line in rest if not line.startswith("  ")], "one message"
    assert snapshot(made) == before
    error = document(invoke(*words, "--json"))["error"]
    assert isinstance(error, dict)
    assert error["exit_code"] == code


def test_verify_and_its_exit_codes(made: Path) -> None:
    good = ("verify", "merged", "--base", "base", "--adapter", "adapter:0.5")
    ended = invoke(*good)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("equal: 13 tensors")
    assert invoke(*good, "--exact").code == 0
    fast = invoke("verify", "merged", "--adapter", "adapter:0.5", "--fast")
    assert (fast.code, "hashes of the receipt" in fast.out) == (0, True)
    wrong = ("verify", "merged", "--base", "base", "--adapter", "adapter")
    ended = invoke(*wrong)
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert lines[0] == "differs: 2 of 13 tensors"
    assert lines[1] == "  all updated tensors: wrong scale; 0.5001 times the update fits"
    ended = invoke(*wrong, "--json", "--report", "report.json")
    assert ended.code == 1
    found = document(ended)
    assert found["schema"] == "loratool/verify/1"
    assert found["verdict"] == "differs"
    assert json.loads((made / "report.json").read_text()) == found


def test_other_rounding_is_no_difference_unless_asked(made: Path) -> None:
    state = llama_like(torch.bfloat16)
    for module, (a, b) in FACTORS.items():
        state[f"{module}.weight"] += (16 / 3 * (b @ a)).bfloat16()
    save_folder(state, made / "theirs", LLAMA)
    words = ("verify", "theirs", "--base", "base", "--adapter", "adapter")
    ended = invoke(*words)
    assert ended.code == 0
    assert ended.out.startswith("within rounding: the update is in 2 tensors, all of them")
    assert "rounded as if delta cast first, then added" in ended.out
    assert invoke(*words, "--exact").code == 1


def test_a_claim(made: Path) -> None:
    state = llama_like(torch.bfloat16)
    torch.manual_seed(1)
    tuned = {name: value + 0.01 * torch.randn(value.shape) for name, value in state.items()}
    save_folder({n: v.bfloat16() for n, v in tuned.items()}, made / "tuned", LLAMA)
    assert invoke("extract", "base", "tuned", "-o", "mine", "--rank", "4", "-q").code == 0
    words = ("verify", "mine", "--base", "base", "--tuned", "tuned")
    ended = invoke(*words)
    assert (ended.code, ended.out.startswith("as stated: it misses ")) == (0, True)
    found = document(invoke(*words, "--json"))
    assert (found["schema"], found["verdict"]) == ("loratool/verify-adapter/1", "as stated")
    ended = invoke("verify", "adapter", "--base", "base", "--tuned", "tuned")
    assert ended.code == 1
    assert "changed, and not in the adapter" in ended.out


def test_no_file_of_an_input_becomes_a_receipt_or_a_report(made: Path) -> None:
    before = snapshot(made)
    weights, config = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    for place in (weights, "base/model-00001-of-00002.safetensors", "adapter/new.safetensors"):
        ended = invoke("merge", "base", "adapter", "-o", "x", f"--receipt={place}", "--overwrite")
        assert ended.code == 5
    (made / "link.json").symlink_to(made / config)
    (made / "link.safetensors").symlink_to(made / weights)
    ended = invoke(
        "merge", "base", "adapter", "-o", "x", "--receipt=link.safetensors", "--overwrite"
    )
    assert ended.code == 5
    for place in (config, weights, "base/config.json", "link.json"):
        ended = invoke("merge", "base", "adapter", "-o", "x", "--report", place)
        assert ended.code == 2
        assert "is no report of loratool's" in ended.err
    for name in ("link.json", "link.safetensors"):
        (made / name).unlink()
    assert snapshot(made) == before
    for output in ("x", "y"):
        ended = invoke("merge", "base", "adapter", "-o", output, "--report", "r.json")
        assert ended.code == 0, "a report may replace another"
    assert json.loads((made / "r.json").read_text())["command"] == "merge"
