"""A killed extraction goes on where it was, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import loratool as lt
from loratool.ops import extract as extract_op
from tests.builders import random_tensor
from tests.ops.builders import LLAMA, llama_like, moved, save_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    state = llama_like(layers=12)
    base = save_folder(state, tmp_path / "base", LLAMA)
    return base, save_folder(moved(state), tmp_path / "tuned", LLAMA)


def run(base: Path, tuned: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "loratool", "extract", str(base), str(tuned), "-o", str(out)]
    return subprocess.Popen([*command, "--rank", "4", "--jobs", "1", "-q"])


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob(".out.loratool-partial-*"))


def interrupt_after(
    count: int,
    pair: tuple[Path, Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> list[str]:
    """Run an extraction that is interrupted after ``count`` tensors; their names."""
    done: list[str] = []
    original = extract_op.extract_tensor

    def interrupted(job: extract_op.ExtractJob, *rest: Any) -> extract_op.ExtractResult:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(job.pair.name)
        return original(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(extract_op, "extract_tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lt.extract(*pair, out, rank=4, jobs=1, **options)
    return done


def test_killed_at_random_moments(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGKILL again and again, at moments spread over the run; the last run is left alone."""
    lt.extract(*pair, tmp_path / "whole", rank=4)
    inputs = {p: p.read_bytes() for side in pair for p in side.iterdir()}
    out = tmp_path / "out"
    generator = random.Random(1)
    went_on = 0
    for _ in range(6):
        process = run(*pair, out)
        deadline = time.monotonic() + 60
        records = generator.randrange(1, 60)
        while process.poll() is None and time.monotonic() < deadline:
            if sum(len(list(f.glob("scratch/*.json"))) for f in leftovers(tmp_path)) >= records:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            break
        went_on += bool(leftovers(tmp_path))
    assert went_on
    if not out.exists():
        assert run(*pair, out).wait() == 0
    assert leftovers(tmp_path) == []
    for name in ("adapter_model.safetensors", "adapter_config.json", "loratool_report.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert inputs == {p: p.read_bytes() for side in pair for p in side.iterdir()}


def test_finished_tensors_are_not_done_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = extract_op.extract_tensor
    first = interrupt_after(20, pair, out, monkeypatch)
    done: list[extract_op.ExtractJob] = []
    assert len(leftovers(tmp_path)) == 1

    def counted(job: extract_op.ExtractJob, *rest: Any) -> extract_op.ExtractResult:
        done.append(job)
        return original(job, *rest)

    monkeypatch.setattr(extract_op, "extract_tensor", counted)
    lt.extract(*pair, out, rank=4, jobs=1)
    assert len(first) == 20
    assert not {job.pair.name for job in done} & set(first)
    lt.extract(*pair, tmp_path / "whole", rank=4)
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_crash_of_the_machine_left_incomplete_is_done_again(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records and factors are not flushed: any of them may come back cut, empty or as zeros."""
    out = tmp_path / "out"
    interrupt_after(20, pair, out, monkeypatch)
    scratch = leftovers(tmp_path)[0] / "scratch"
    factors, records = sorted(scratch.glob("*.raw")), sorted(scratch.glob("*.json"))
    assert len(factors) >= 4
    assert len(records) >= 6
    factors[0].write_bytes(bytes(factors[0].stat().st_size))
    factors[1].write_bytes(factors[1].read_bytes()[:-8])
    factors[2].unlink()
    records[-1].write_bytes(b"")
    records[-2].write_bytes(records[-2].read_bytes()[:-30])
    lt.extract(*pair, out, rank=4, jobs=1)
    lt.extract(*pair, tmp_path / "whole", rank=4)
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_options_or_inputs_start_afresh(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt_after(10, pair, out, monkeypatch)
    report = lt.extract(*pair, out, rank=5, jobs=1)
    assert {row.rank for row in report.rows if row.rank} == {5}
    assert leftovers(tmp_path) == []


def test_another_scale_of_the_adapter_continued_from_starts_afresh(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--alpha is no part of the adapter's file."""
    old = tmp_path / "old.safetensors"
    module = "model.layers.0.mlp.up_proj"
    save_file(
        {
            f"{module}.lora_A": random_tensor(2, 24),
            f"{module}.lora_B": random_tensor(40, 2),
        },
        old,
    )
    interrupt_after(60, pair, tmp_path / "out", monkeypatch, into=old, alpha=2)
    lt.extract(*pair, tmp_path / "out", rank=4, jobs=1, into=old, alpha=6)
    lt.extract(*pair, tmp_path / "whole", rank=4, jobs=1, into=old, alpha=6)
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_number_of_heads_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json decides which rows of a fused matrix are the query's."""
    state = {f"transformer.h.{i}.attn.c_attn.weight": random_tensor(48, 8) for i in range(3)}

    def config(heads: int) -> dict[str, Any]:
        return {"model_type": "gpt_bigcode", "n_head": heads, "multi_query": True}

    base = save_folder(state, tmp_path / "base", config(2))
    tuned = save_folder(moved(state), tmp_path / "tuned", config(2))
    options: dict[str, Any] = {"split_fused": True, "profile": "vllm"}
    interrupt_after(5, (base, tuned), tmp_path / "out", monkeypatch, **options)
    for side in (base, tuned):
        (side / "config.json").write_text(json.dumps(config(4)))
    lt.extract(base, tuned, tmp_path / "out", rank=4, jobs=1, **options)
    lt.extract(base, tuned, tmp_path / "whole", rank=4, jobs=1, **options)
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
