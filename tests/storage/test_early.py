"""A file begun on a guess holds what is in truth asked for, whatever was guessed."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.storage import early
from loratool.storage.early import EarlyFile
from loratool.storage.safetensors_file import read_header
from loratool.storage.tensors import LazyTensor, MemoryTensor, TensorInfo
from loratool.storage.writing import write_tensors
from tests.builders import random_tensor

METADATA = {"format": "pt"}


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, TensorInfo]:
    values = {name: random_tensor(30, 7, seed=seed) for seed, name in enumerate("abc")}
    save_file(values, tmp_path / "source.safetensors")
    return dict(read_header(tmp_path / "source.safetensors").tensors)


def foreseen(shape: tuple[int, ...]) -> LazyTensor:
    return MemoryTensor(torch.empty(shape, device="meta"))


def finished(path: Path, guess: EarlyFile, truth: dict[str, LazyTensor]) -> set[str]:
    """What the guess placed, once the whole file is written and compared with an ordinary one."""
    placed = guess.finish(truth, METADATA)
    assert path.exists() == bool(placed)
    write_tensors(path, truth, METADATA, placed)
    ordinary = path.with_name("ordinary")
    write_tensors(ordinary, truth, METADATA)
    assert path.read_bytes() == ordinary.read_bytes()
    assert torch.equal(load_file(path)["x"], truth["x"].read())
    return placed


def test_a_right_guess_is_kept(stored: dict[str, TensorInfo], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    guess = EarlyFile(path, {"x": foreseen((4, 5)), **stored}, METADATA)
    guess.begin()
    truth = {"x": MemoryTensor(random_tensor(4, 5)), **stored}
    assert finished(path, guess, truth) == set("abc")
    assert guess.seconds > 0


def test_pieces_put_together_are_the_tensor(
    stored: dict[str, TensorInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "_PIECE_BYTES", 64)
    path = tmp_path / "out.safetensors"
    guess = EarlyFile(path, {"x": foreseen((1,)), **stored}, METADATA)
    guess.begin()
    truth = {"x": MemoryTensor(torch.ones(1)), **stored}
    assert finished(path, guess, truth) == set("abc")


@pytest.mark.parametrize("wrong", ["a rank", "a dtype", "a tensor less", "the order"])
def test_a_wrong_guess_leaves_nothing(
    stored: dict[str, TensorInfo], tmp_path: Path, wrong: str
) -> None:
    path = tmp_path / "out.safetensors"
    x = MemoryTensor(random_tensor(4, 5))
    truth = {"x": x, **stored}
    guesses = {
        "a rank": {"x": foreseen((5, 4)), **stored},
        "a dtype": {"x": MemoryTensor(torch.empty(4, 5, device="meta").bfloat16()), **stored},
        "a tensor less": {"x": foreseen((4, 5)), "y": foreseen((2,)), **stored},
        "the order": {**stored, "x": foreseen((4, 5))},
    }
    guess = EarlyFile(path, guesses[wrong], METADATA)
    guess.begin()
    assert finished(path, guess, truth) == set()


def test_values_from_elsewhere_are_not_taken_for_those(
    stored: dict[str, TensorInfo], tmp_path: Path
) -> None:
    """Equal names and shapes are not equal tensors."""
    path = tmp_path / "out.safetensors"
    guess = EarlyFile(path, {"x": foreseen((4, 5)), **stored}, METADATA)
    guess.begin()
    truth = {"x": MemoryTensor(random_tensor(4, 5)), **stored, "b": stored["a"]}
    assert finished(path, guess, truth) == {"a", "c"}


def test_a_guess_given_up_is_never_begun(stored: dict[str, TensorInfo], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    guess = EarlyFile(path, stored, METADATA)
    guess.give_up()
    guess.begin()
    assert guess.finish(stored, METADATA) == set()
    assert not path.exists()


def test_what_fails_early_is_said_by_the_ordinary_way(
    stored: dict[str, TensorInfo], tmp_path: Path
) -> None:
    """A source that is gone, and an output folder that cannot be: no thread's traceback."""
    (tmp_path / "source.safetensors").unlink()
    path = tmp_path / "out.safetensors"
    guess = EarlyFile(path, stored, METADATA)
    guess.begin()
    assert guess.finish(stored, METADATA) == set()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        write_tensors(path, stored, METADATA)


def test_closing_waits_for_the_thread(stored: dict[str, TensorInfo], tmp_path: Path) -> None:
    guess = EarlyFile(tmp_path / "out.safetensors", stored, METADATA)
    guess.begin()
    guess.close()
    assert guess.seconds > 0, "it ended"
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_file_that_was_moved_is_not_removed(
    stored: dict[str, TensorInfo], tmp_path: Path
) -> None:
    guess = EarlyFile(tmp_path / "out" / "a.safetensors", stored, METADATA)
    guess.begin()
    assert guess.finish(stored, METADATA) == set("abc")
    (tmp_path / "out").rename(tmp_path / "published")
    guess.close()
    assert set(load_file(tmp_path / "published" / "a.safetensors")) == set("abc")


def test_closing_waits_although_finishing_was_interrupted(
    stored: dict[str, TensorInfo], tmp_path: Path
) -> None:
    """The source is a pipe, so that the copy waits for us."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = {name: replace(tensor, path=pipe) for name, tensor in stored.items()}
    guess = EarlyFile(tmp_path / "out.safetensors", waiting, METADATA)
    guess.begin()
    main = threading.main_thread().ident
    assert main is not None
    interrupt = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        guess.finish(waiting, METADATA)
    assert guess.seconds == 0, "it has not ended"
    release = threading.Timer(0.3, lambda: pipe.open("wb").close())
    release.start()
    guess.close()
    assert guess.seconds > 0
    release.join()
