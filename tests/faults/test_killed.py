"""A process that dies at the worst moment leaves no output, and nothing for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loratool.cli.main import main
from loratool.storage.outputs import staged
from tests.builders import lora_factors, random_tensor, relative_paths, write_checkpoint, write_peft

STAGES_AND_WAITS = """
import sys, time
from pathlib import Path
from loratool.storage.outputs import staged
with staged(Path(sys.argv[1])) as staging:
    (staging.out / "model.safetensors").write_bytes(b"half a model")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_and_kill(output: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STAGES_AND_WAITS, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "ready\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_process_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    output = tmp_path / "out [1]*"
    start_and_kill(output)
    assert not output.exists()
    left = relative_paths(tmp_path)
    assert any(name.endswith("out/model.safetensors") for name in left), "nothing was tested"
    assert all(name.startswith(".") for name in left)

    with staged(tmp_path / "another"):
        assert relative_paths(tmp_path)[: len(left)], "only runs for the same output clean up"
    assert relative_paths(tmp_path) == left

    with staged(output) as staging:
        (staging.out / "model.safetensors").write_bytes(b"a whole model")
        staging.publish(overwrite=False)
    assert relative_paths(tmp_path) == [output.name, f"{output.name}/model.safetensors"]


def test_a_merge_killed_while_it_writes(tmp_path: Path) -> None:
    """Either nothing is there or all of it; then the same command simply works."""
    width = 512
    weights = {f"m.{i}.q.weight": random_tensor(width, width, seed=i) for i in range(24)}
    factors: dict[str, torch.Tensor] = {}
    for index in range(24):
        factors |= lora_factors(f"m.{index}.q", width, width, 4, seed=index)
    base = write_checkpoint(tmp_path / "base", weights)
    adapter = write_peft(tmp_path / "adapter", factors)
    output = tmp_path / "merged"
    arguments = ["merge", str(base), str(adapter), "-o", str(output), "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loratool", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(tmp_path.glob(".merged.*/out/model.safetensors")):
            process.kill()
            break
        time.sleep(0.001)
    process.wait()
    if output.exists():
        assert (output / "model.safetensors").stat().st_size == (
            base / "model.safetensors"
        ).stat().st_size
        pytest.skip("the merge was quicker than the kill")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]
