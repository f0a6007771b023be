"""Merges killed at any step: what was there is harmed by none, and ends well by resume or recover.

The quick tests take every few steps, the slow ones all of them.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import loratool as lt
from loratool.ops import merge_in_place, merge_work
from loratool.storage import outputs
from loratool.storage.journal_holder import JOURNAL, OVER
from tests.cli.invoke import invoke
from tests.faults.killing import COUNT_ONLY, bytes_of, run
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors

EVERY = [
    pytest.param(29, id="some"),
    pytest.param(1, id="all", marks=pytest.mark.slow),
]
MOMENTS = [pytest.param(8, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
PLACES = [
    pytest.param(False, 29, id="some"),
    pytest.param(True, 29, id="some-linked"),
    pytest.param(False, 1, id="all", marks=pytest.mark.slow),
    pytest.param(True, 4, id="many-linked", marks=pytest.mark.slow),  # differs by one copy
]
CHANGED = {
    Q0: factors(24, 24),
    DOWN1: factors(24, 40),
    "model.layers.0.mlp.up_proj": factors(40, 24),
    "model.layers.1.self_attn.k_proj": factors(12, 24),
    "lm_head": factors(50, 24),
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A base of two shards, of which one is a hard link, and an adapter; small jobs, one thread."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    (base / "tokenizer.json").write_text("{}")
    adapter = save_peft(tmp_path / "adapter", CHANGED)
    monkeypatch.setattr(merge_work, "JOB_BYTES", 600)
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 600)
    monkeypatch.setattr(outputs, "_FLUSH_SECONDS", 0.0)
    return base, adapter


@pytest.mark.parametrize("every", EVERY)
def test_a_merge_killed_at_any_step_is_resumed(
    inputs: tuple[Path, Path], tmp_path: Path, every: int
) -> None:
    base, adapter = inputs
    before, out = bytes_of(base), tmp_path / "out"
    lt.merge(base, adapter, tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    command = ("merge", base, adapter, "-o", out, "--jobs", 1)
    killed = 0
    for die_at in range(1, 10_000, every):
        code, _ = run(command, die_at)
        if code is None:
            killed += 1
            assert not out.exists() or bytes_of(out) == expected
            if not out.exists():
                code, _ = run(command, COUNT_ONLY)
                assert code == 0
        assert bytes_of(out) == expected
        assert bytes_of(base) == before
        leftover = {path.name for path in tmp_path.iterdir()} - {"adapter", "base", "whole", "out"}
        shutil.rmtree(out)
        for name in leftover:  # killed after the output was published, or while setting up
            assert name.startswith(".out.loratool-")
            shutil.rmtree(tmp_path / name)
        if code is not None and die_at > killed * every:
            break
    assert killed >= (30 if every == 1 else 2)


def test_a_record_is_not_believed_of_a_file_made_anew(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """What a killed run recorded is void once its file is gone, also for the run after the next."""
    base, adapter = inputs
    out = tmp_path / "out"
    lt.merge(base, adapter, tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    command = ("merge", base, adapter, "-o", out, "--jobs", 1)
    killed = 0
    for second in range(20, 120, 12):
        first = 150
        while run(command, first)[0] is not None:  # how many steps there are varies
            shutil.rmtree(out)
            first -= 10
        for file in tmp_path.glob(".out.loratool-*/out/*.safetensors"):
            file.unlink()  # as publishing moves them away
        killed += run(command, second)[0] is None
        shutil.rmtree(out, ignore_errors=True)
        assert run(command, COUNT_ONLY)[0] == 0
        assert bytes_of(out) == expected
        shutil.rmtree(out)
    assert killed


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_merge_killed_at_random_moments_is_resumed(
    inputs: tuple[Path, Path], tmp_path: Path, moments: int
) -> None:
    """Killed again and again at random moments, each time a little further or from the start."""
    base, adapter = inputs
    before, out = bytes_of(base), tmp_path / "out"
    began = time.perf_counter()
    assert run(("merge", base, adapter, "-o", tmp_path / "whole", "--jobs", 2))[0] == 0
    lasts = time.perf_counter() - began
    expected = bytes_of(tmp_path / "whole")
    generator = random.Random(moments)
    killed = 0
    for _ in range(moments):
        command = ("merge", base, adapter, "-o", out, "--jobs", 2)
        began = time.perf_counter()
        code, _ = run(command, die_after=lasts * generator.random())
        killed += code is None
        if code is not None:  # it finished: the machine has become quicker
            lasts = min(lasts, time.perf_counter() - began)
        assert bytes_of(base) == before
        if out.exists():
            assert bytes_of(out) == expected
            shutil.rmtree(out)
    assert run(("merge", base, adapter, "-o", out, "--jobs", 2))[0] == 0
    assert bytes_of(out) == expected
    assert killed > moments // 4


def test_a_base_that_cannot_be_read(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th reading fails as on a broken disk, whichever n: an error, and nothing is left."""
    before, failed = bytes_of(tmp_path), 0
    preadv = os.preadv
    for fails_at in range(1, 200, 4):
        calls = [0]

        def failing(*words: Any, calls: list[int] = calls, at: int = fails_at) -> int:
            calls[0] += 1
            if calls[0] == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(*words)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            ended = invoke("merge", *inputs, "-o", tmp_path / "out", "--jobs", "1")
        if ended.code == 0:
            break
        failed += 1
        assert ended.code == 3
        assert "Input/output error" in ended.err
        assert "Traceback" not in ended.err
        assert bytes_of(tmp_path) == before
    assert failed > 3


@pytest.mark.parametrize(("linked", "every"), PLACES)
def test_a_merge_in_place_killed_at_any_step_is_recovered(
    inputs: tuple[Path, Path], tmp_path: Path, linked: bool, every: int
) -> None:
    base, adapter = inputs
    before = bytes_of(base)
    lt.merge(base, adapter, tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    killed = 0
    for die_at in range(1, 10_000, every):
        work = _working_copy(base, tmp_path, linked)
        code, _ = run(("merge", work, adapter, "--in-place", "--jobs", 1), die_at, seed=die_at)
        killed += code is None
        _recover(work, code is None, die_at, before, expected)
        assert bytes_of(base) == before
        if code is not None:
            break
    assert killed >= (100 // every if every < 29 else 3)


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_merge_in_place_killed_at_random_moments(
    inputs: tuple[Path, Path], tmp_path: Path, moments: int
) -> None:
    """Also in the middle of what is no step, with two jobs side by side."""
    base, adapter = inputs
    before = bytes_of(base)
    lt.merge(base, adapter, tmp_path / "whole")
    expected = bytes_of(tmp_path / "whole")
    began = time.perf_counter()
    work = _working_copy(base, tmp_path, False)
    assert run(("merge", work, adapter, "--in-place", "--jobs", 2))[0] == 0
    lasts = time.perf_counter() - began
    generator = random.Random(moments)
    killed = 0
    for number in range(moments):
        work = _working_copy(base, tmp_path, False)
        moment = lasts * generator.random()
        began = time.perf_counter()
        code, _ = run(("merge", work, adapter, "--in-place", "--jobs", 2), die_after=moment)
        killed += code is None
        if code is not None:
            lasts = min(lasts, time.perf_counter() - began)
        _recover(work, code is None, number, before, expected)
    assert killed > moments // 4


def _working_copy(base: Path, tmp_path: Path, linked: bool) -> Path:
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    if linked:
        shard = base / "model-00001-of-00002.safetensors"
        (work / shard.name).unlink()
        os.link(shard, work / shard.name)
    return work


def _recover(
    work: Path, died: bool, number: int, before: dict[str, bytes], expected: dict[str, bytes]
) -> None:
    """End it forward and back in turn, and die while at it the first time."""
    if not (work / JOURNAL).exists():
        assert not lt.recover(work).found
        wanted = expected if _visible(work) != before else before
        assert died or wanted is expected
    else:
        assert died
        with pytest.raises(lt.LoratoolError, match="changed in place"):
            lt.inspect(work)
        assert lt.recover(work).found
        direction: Literal["forward", "back"] = "forward" if number % 2 else "back"
        run(("recover", work, f"--{direction}", "--jobs", 1), 1 + number % 17, seed=number)
        lt.recover(work, direction)
        wanted = expected if direction == "forward" else before
    assert _visible(work) == wanted, number


def _visible(folder: Path) -> dict[str, bytes]:
    """All files but what a process left that died before its journal began or after its end."""
    return {
        name: data
        for name, data in bytes_of(folder).items()
        if not name.startswith((f"{JOURNAL}-setup-", f"{JOURNAL}-over-"))
    }


def test_what_cannot_be_as_it_was_is_not_said_to_be(inputs: tuple[Path, Path]) -> None:
    """A file cut short by something else, and a journal that was not written for a merge."""
    base, adapter = inputs
    code, _ = run(("merge", base, adapter, "--in-place", "--jobs", 1), die_at=30)
    assert code is None
    facts = base / JOURNAL / "journal.json"
    text = facts.read_text()
    for slip in ({"bytes": "x"}, {"blocks": -1}, {"asked": {}}, {"asked": {"adapters": []}}):
        facts.write_text(json.dumps(json.loads(text) | slip))
        ended = invoke("recover", base, "--forward")
        assert (ended.code, "not one that this loratool wrote" in ended.err) == (3, True)
    facts.write_text(text)
    name = json.loads(text)["files"][0]
    whole = (base / name).read_bytes()
    (base / name).write_bytes(whole[:-1])
    ended = invoke("recover", base, "--back")
    assert (ended.code, "is truncated" in ended.err) == (3, True)
    (base / name).write_bytes(whole)
    assert invoke("recover", base, "--back").code == 0


@pytest.mark.parametrize("way", ["--back", "--forward"])
def test_what_a_kill_left_of_an_ended_journal_goes(inputs: tuple[Path, Path], way: str) -> None:
    """It may hold the old values; looking alone removes nothing."""
    base, _ = inputs
    left = base / f"{OVER}1234"
    left.mkdir()
    (left / "log").write_bytes(b"old")
    assert invoke("recover", base).code == 0
    assert left.is_dir()
    assert invoke("recover", base, way).code == 0
    assert not left.exists()
