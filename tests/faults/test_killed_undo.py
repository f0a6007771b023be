"""merge --receipt, unmerge and swap killed at any step or moment: nothing is harmed, nothing is
half there, and the same command then gives the bytes of an undisturbed run.

The quick tests take some steps and moments, the slow ones all and many.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.faults.killing import COUNT_ONLY, bytes_of, run
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors

EVERY = [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
MOMENTS = [pytest.param(6, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
COMMANDS = {
    "unmerge": ("unmerge", "merged", "adapter"),
    "swap": ("swap", "merged", "--remove", "adapter", "--add", "other"),
    "merge": ("merge", "base", "adapter", "--receipt"),
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base/, adapter/, other/ and merged/ with a receipt."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    (base / "tokenizer.json").write_text("{}")
    save_peft(tmp_path / "adapter", {Q0: factors(24, 24), DOWN1: factors(24, 40)})
    save_peft(tmp_path / "other", {Q0: factors(24, 24, seed=7)})
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged", receipt=True)
    return tmp_path


def command_in(made: Path, name: str) -> list[object]:
    """The command line, paths in ``made``."""
    first, *rest = COMMANDS[name]
    paths = [word if word.startswith("--") else made / word for word in rest]
    return [first, *paths, "-o", made / "out", "--jobs", 1]


def inputs_of(made: Path) -> dict[str, bytes]:
    return {
        name: data
        for folder in ("base", "adapter", "other", "merged")
        for name, data in bytes_of(made / folder).items()
    }


def clear(made: Path) -> None:
    """Remove the output, and what a killed run left beside it."""
    for path in made.iterdir():
        if path.name == "out" or path.name.startswith(".out.loratool-"):
            shutil.rmtree(path)


def ends_well(made: Path, command: list[object], expected: dict[str, bytes]) -> None:
    """After a kill: all of the output or none; then the same command gives all of it."""
    out = made / "out"
    if out.exists():
        assert bytes_of(out) == expected
        return
    code, _ = run(command, COUNT_ONLY)
    assert code == 0
    assert bytes_of(out) == expected


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_step(made: Path, name: str, every: int) -> None:
    before, command = inputs_of(made), command_in(made, name)
    code, steps = run(command)
    assert code == 0
    expected = bytes_of(made / "out")
    clear(made)
    killed = 0
    for die_at in range(1, steps + 1, every):
        code, _ = run(command, die_at, seed=die_at)
        killed += code is None
        ends_well(made, command, expected)
        assert inputs_of(made) == before
        clear(made)
    assert killed > 0.7 * steps / every


@pytest.mark.parametrize("count", MOMENTS)
def test_an_unmerge_killed_at_any_moment(made: Path, count: int) -> None:
    before, command = inputs_of(made), command_in(made, "unmerge")
    begin = time.monotonic()
    assert run(command)[0] == 0
    lasts = time.monotonic() - begin
    expected = bytes_of(made / "out")
    clear(made)
    chance = random.Random(1)
    for _ in range(count):
        run(command, die_after=max(0.001, chance.random() * lasts))
        ends_well(made, command, expected)
        assert inputs_of(made) == before
        clear(made)
