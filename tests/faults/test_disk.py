"""Disks that refuse in the middle of the work: one error of the right kind, nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from loratool.errors import NoSpace
from loratool.ops import extract_early
from loratool.storage.dtypes import BY_NAME
from loratool.storage.outputs import staged
from loratool.storage.writing import create_safetensors
from tests.builders import (
    gpt2_weights,
    lora_factors,
    relative_paths,
    snapshot,
    write_checkpoint,
    write_peft,
)
from tests.ops.builders import LLAMA, llama_like, save_folder

UNDER_LIMITS = """
import contextlib, io, json, resource, sys
from loratool.cli.main import main
limits, arguments = json.loads(sys.argv[1]), sys.argv[2:]
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
results = []
for limit in limits:
    out, err = io.StringIO(), io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    results.append([limit, code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run_under_limits(limits: list[int], *arguments: object) -> list[tuple[int, int, str, str]]:
    """Run the command once per limit on the size of any file it writes (EFBIG beyond)."""
    words = [json.dumps(limits), *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMITS, *words], capture_output=True, text=True, check=True
    )
    results: list[Any] = json.loads(done.stdout)
    return [tuple(result) for result in results]


def check_refusals(results: list[tuple[int, int, str, str]], output: Path | None) -> None:
    assert results, "nothing was tested"
    for limit, code, out, err in results:
        assert code == 5, (limit, out, err)
        assert out == ""
        assert err.startswith("error: ")
        assert "cannot be written: File too large" in err
        assert "Traceback" not in err
    assert output is None or not output.exists()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    weights = gpt2_weights(width=16, vocabulary=64)
    write_checkpoint(tmp_path / "base", weights, {"model_type": "gpt2"})
    (tmp_path / "base" / "tokenizer.json").write_text("x" * 40_000)
    name = "transformer.h.0.attn.c_attn.weight"
    tuned = weights | {name: weights[name] + 0.1 * torch.randn(weights[name].shape)}
    write_checkpoint(tmp_path / "tuned", tuned, {"model_type": "gpt2"})
    factors = lora_factors("transformer.h.0.attn.c_attn", 48, 16, 2)
    write_peft(tmp_path / "adapter", factors, fan_in_fan_out=True)
    return tmp_path


def test_a_merge_that_cannot_be_written(inputs: Path) -> None:
    """At 30 kB it fails on side files: the weights are 20 kB, tokenizer.json is 40 kB."""
    before = snapshot(inputs)
    weights = (inputs / "base" / "model.safetensors").stat().st_size
    limits = [100, weights // 2, weights + 1000]
    output = inputs / "new" / "merged"
    results = run_under_limits(limits, "merge", inputs / "base", inputs / "adapter", "-o", output)
    check_refusals(results, output)
    assert snapshot(inputs) == before


def test_an_extraction_that_cannot_be_written(inputs: Path) -> None:
    """The limits stop it at the factors, at the adapter, and at the report."""
    before = snapshot(inputs)
    output = inputs / "new" / "extracted"
    arguments = ("extract", inputs / "base", inputs / "tuned", "-o", output, "--rank", "2")
    *refused, written = run_under_limits([100, 600, 1500, 10**9], *arguments)
    check_refusals(refused, None)
    assert written[1] == 0
    assert set(snapshot(inputs)) - set(before) == {
        "new",
        "new/extracted",
        "new/extracted/adapter_config.json",
        "new/extracted/adapter_model.safetensors",
        "new/extracted/loratool_report.json",
    }
    sizes = {path.name: path.stat().st_size for path in output.iterdir()}
    assert sizes["adapter_model.safetensors"] < 1500 < sizes["loratool_report.json"]
    assert sizes["adapter_model.safetensors"] > 600


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this process may not mount a file system")
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up(small_disk: Path) -> None:
    """Room for a sparse file is not room for its data."""
    with pytest.raises(NoSpace, match="no space left"), staged(small_disk / "out") as staging:  # noqa: PT012
        path = staging.out / "m.safetensors"
        slots = create_safetensors(path, {"w": (BY_NAME["F32"], (100_000,))}, {})
        slots["w"].write(torch.ones(100_000))
    assert relative_paths(small_disk) == []


def test_a_side_file_on_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(NoSpace, match="no space left"), staged(small_disk / "out") as staging:
        (staging.out / "tokenizer.json").write_bytes(b"x" * 400_000)
    assert relative_paths(small_disk) == []


@pytest.mark.parametrize("free", [24, 48, 80, 96, 112])
def test_an_extraction_that_stores_ahead_on_a_disk_that_fills_up(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """It has room neither for the factors nor for the file that was begun, for one, or almost for
    both; all threads end with one error."""
    monkeypatch.setattr(extract_early, "LEAST_BYTES", 0)
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder({n: w + 0.1 for n, w in state.items()}, tmp_path / "tuned", LLAMA)
    (small_disk / "filler").write_bytes(bytes(1024 * (256 - free)))
    whole = {"embed_tokens": "whole", "lm_head": "whole"}
    with pytest.raises(NoSpace, match="no space left"):
        lt.extract(base, tuned, small_disk / "new" / "out", rank=4, rank_for=whole, jobs=2)
    assert relative_paths(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    lt.extract(base, tuned, small_disk / "new" / "out", rank=4, rank_for=whole, jobs=2)
