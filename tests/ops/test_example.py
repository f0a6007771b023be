"""The example pair that ships with loratool, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt


def test_full_rank_gives_back_every_weight(example_pair: Path, tmp_path: Path) -> None:
    base, tuned = example_pair / "base", example_pair / "tuned"
    lt.extract(base, tuned, tmp_path / "adapter", rank="full", dtype="float32")
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    expected = load_file(tuned / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(expected)
    equal = total = 0
    for name, value in expected.items():
        distance = merged[name].view(torch.int16).int() - value.view(torch.int16).int()
        same_sign = (merged[name].float() * value.float()) >= 0
        assert int(distance.abs()[same_sign].max()) <= 1
        assert bool(same_sign.all())
        equal += int((merged[name] == value).sum())
        total += value.numel()
    print(f"{equal:,} of {total:,} weights exactly equal ({100 * equal / total:.4f} %)")
    assert equal >= 0.9999 * total  # where W is a millionth of its change, float32 cannot hold it


def test_every_parameter_moved(example_pair: Path) -> None:
    """The pair is a real full fine-tune of everything."""
    report = lt.inspect(example_pair / "base", example_pair / "tuned")
    assert report.unchanged == ()
    assert {row.kind for row in report.rows} == {
        "conv1d",
        "embedding",
        "position table",
        "norm",
        "bias",
    }


def test_more_rank_keeps_more(example_pair: Path, tmp_path: Path) -> None:
    kept = []
    for rank in (1, 8, 32):
        out = tmp_path / f"r{rank}"
        report = lt.extract(example_pair / "base", example_pair / "tuned", out, rank=rank)
        kept.append(1 - report.relative_error**2)
    assert kept == sorted(kept)
    assert 0.2 < kept[0] < kept[2] < 0.95


def test_the_files_are_small_and_complete(example_pair: Path) -> None:
    for side in ("base", "tuned"):
        assert (example_pair / side / "model.safetensors").stat().st_size <= 4_000_000
        config = json.loads((example_pair / side / "config.json").read_text())
        assert config["model_type"] == "gpt2"
    assert len((example_pair / "heldout.txt").read_text(encoding="utf-8").splitlines()) >= 250
    assert "CC BY-SA 4.0" in (example_pair / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_demo_prints_its_table(example_pair: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example_pair / "demo.py")], capture_output=True, text=True, check=True
    )
    gains = [
        int(line.split()[-2])
        for line in done.stdout.splitlines()
        if line.startswith(("base ", "fine-tuned "))
    ]
    assert gains[:2] == [0, 100]
    assert gains[2:] == sorted(gains[2:])
    assert gains[-1] > 90
