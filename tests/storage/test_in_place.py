"""The journal of changes in place: what it promises at every length of every file it writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratool.errors import MalformedFile, OutputError, Unfinished
from loratool.storage.checkpoint import open_checkpoint, open_weight_file
from loratool.storage.differences import pack_difference, unpack_difference
from loratool.storage.frames import framed
from loratool.storage.in_place import Block, Journal, undone_on_failure
from loratool.storage.journal_holder import JOURNAL
from loratool.storage.writing import write_at
from tests.builders import llama_weights, relative_paths, write_checkpoint

OLD = bytes(range(200)) * 3
NEW = bytes((7 * i) % 256 for i in range(100))
FIRST, SECOND = Block("file", 50, 100, 2), Block("file", 300, 100, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(OLD)
    return tmp_path


def begin(folder: Path) -> Journal:
    return Journal.begin(folder, ["file"], {"about": "a test"}, 1000)


def overwrite(folder: Path, block: Block, data: bytes = NEW) -> None:
    write_at(folder / block.file, block.offset, memoryview(data))


def changed(*blocks: Block) -> bytes:
    data = bytearray(OLD)
    for block in blocks:
        data[block.offset : block.offset + block.nbytes] = NEW
    return bytes(data)


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.binary(max_size=400),
    st.binary(max_size=400),
)
def test_the_way_back_leads_back(width: int, original: bytes, other: bytes) -> None:
    length = min(len(original), len(other)) // width * width
    original, other = original[:length], other[:length]
    assert unpack_difference(pack_difference(original, other, width), other, width) == original


def test_small_changes_are_small() -> None:
    """One step in one value of ten, in 9 MB, three pieces: far below a bit per byte."""
    values = np.random.default_rng(0).integers(0, 2**16, 4_500_000, dtype=np.uint16)
    stepped = values + (np.arange(len(values)) % 10 == 0).astype(np.uint16)
    packed = pack_difference(values.tobytes(), stepped.tobytes(), 2)
    assert unpack_difference(packed, stepped.tobytes(), 2) == values.tobytes()
    assert len(packed) < values.nbytes / 8


def test_work_reads_the_original_and_undoing_brings_it_back(folder: Path) -> None:
    journal = begin(folder)
    seen = []

    def work(path: Path, at: int) -> None:
        overwrite(folder, FIRST)
        seen.append(path.read_bytes()[at : at + FIRST.nbytes])

    journal.change(FIRST, work)
    assert seen == [OLD[50:150]]
    assert (folder / "file").read_bytes() == changed(FIRST)
    assert journal.is_done(FIRST)
    assert not journal.is_done(SECOND)
    journal.undo(lambda _: None)
    assert (folder / "file").read_bytes() == OLD
    assert relative_paths(folder) == ["file"]


def test_ending_keeps_the_change(folder: Path) -> None:
    journal = begin(folder)
    journal.change(FIRST, lambda *_: overwrite(folder, FIRST))
    journal.end()
    assert (folder / "file").read_bytes() == changed(FIRST)
    assert relative_paths(folder) == ["file"]


def interrupted(folder: Path) -> None:
    """One block done; in the next, half of the new bytes written."""

    def half(*_: object) -> None:
        overwrite(folder, SECOND, NEW[:50])
        raise InterruptedError

    journal = begin(folder)
    journal.change(FIRST, lambda *_: overwrite(folder, FIRST))
    with pytest.raises(InterruptedError):
        journal.change(SECOND, half)
    journal.release()


def take(folder: Path) -> Journal:
    journal = Journal.take(folder)
    assert journal is not None
    return journal


def test_what_was_in_between_is_known_and_settled(folder: Path) -> None:
    interrupted(folder)
    journal = take(folder)
    assert journal.facts["about"] == "a test"
    assert journal.state.done == (FIRST,)
    assert journal.state.between == (SECOND,)
    journal.settle()
    assert (folder / "file").read_bytes() == changed(FIRST)
    assert journal.state.between == ()
    journal.change(SECOND, lambda *_: overwrite(folder, SECOND))
    journal.undo(lambda _: None)
    assert (folder / "file").read_bytes() == OLD


def test_files_cut_short_at_any_byte(folder: Path, tmp_path: Path) -> None:
    """A guard that is not whole guarded nothing yet; a log entry that is not is still guarded."""
    interrupted(folder)
    (guard,) = (folder / JOURNAL).glob("guard-*")
    log = folder / JOURNAL / "log"
    whole, logged = guard.read_bytes(), log.read_bytes()
    for length in range(len(whole)):
        trial = tmp_path / "trial"
        shutil.copytree(folder, trial, ignore=shutil.ignore_patterns("trial"))
        write_at(trial / "file", SECOND.offset, memoryview(OLD[300:400]))
        (trial / JOURNAL / guard.name).write_bytes(whole[:length])
        journal = take(trial)
        assert journal.state.between == ()
        journal.undo(lambda _: None)
        assert (trial / "file").read_bytes() == OLD
        shutil.rmtree(trial)
    first_guard = guard.with_name(f"guard-{FIRST.offset}-file")
    for length in range(len(logged)):
        trial = tmp_path / "trial"
        shutil.copytree(folder, trial, ignore=shutil.ignore_patterns("trial"))
        journal = take(trial)
        original = Journal._guard(journal, FIRST, OLD[50:150])
        journal.release()
        (trial / JOURNAL / "log").write_bytes(logged[:length])
        assert original.name == first_guard.name
        take(trial).undo(lambda _: None)
        assert (trial / "file").read_bytes() == OLD
        shutil.rmtree(trial)


def test_files_that_something_else_changed_are_not_made_worse(folder: Path) -> None:
    interrupted(folder)
    write_at(folder / "file", FIRST.offset + 5, memoryview(b"?"))
    before = (folder / "file").read_bytes()
    with pytest.raises(MalformedFile, match="changed by something else"):
        take(folder).undo(lambda _: None)
    after = (folder / "file").read_bytes()
    assert after[: SECOND.offset] == before[: SECOND.offset]


def test_one_at_a_time(folder: Path) -> None:
    journal = begin(folder)
    with pytest.raises(OutputError, match="another loratool"):
        begin(folder)
    with pytest.raises(OutputError, match="running loratool"):
        Journal.take(folder)
    journal.release()
    with pytest.raises(Unfinished, match="interrupted here"):
        begin(folder)
    take(folder).undo(lambda _: None)
    assert relative_paths(folder) == ["file"]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_link_is_broken_before_anything_changes(
    folder: Path, tmp_path: Path, link: object
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (folder / "file").rename(elsewhere)
    os.chmod(elsewhere, 0o640)
    assert callable(link)
    link(elsewhere, folder / "file")
    journal = begin(folder)
    journal.own("file")
    journal.change(FIRST, lambda *_: overwrite(folder, FIRST))
    journal.end()
    assert elsewhere.read_bytes() == OLD
    assert (folder / "file").read_bytes() == changed(FIRST)
    assert not (folder / "file").is_symlink()
    assert (folder / "file").stat().st_mode & 0o777 == 0o640


def test_a_failure_puts_everything_back(folder: Path) -> None:
    journal = begin(folder)
    with pytest.raises(ZeroDivisionError) as failed, undone_on_failure(journal):  # noqa: PT012
        journal.change(FIRST, lambda *_: overwrite(folder, FIRST))
        raise ZeroDivisionError
    assert failed.value.__notes__ == ["everything was put back as it was"]
    assert (folder / "file").read_bytes() == OLD
    assert relative_paths(folder) == ["file"]


def test_only_the_journals_own_process_may_read(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_weights())
    journal = Journal.begin(base, ["model.safetensors"], {}, 10)
    open_checkpoint(base)
    journal.release()
    for path in (base, base / "model.safetensors"):
        with pytest.raises(Unfinished, match="when the work was interrupted"):
            open_checkpoint(path)
    (base / JOURNAL / "journal.json").write_text("{")
    with pytest.raises(Unfinished):
        open_checkpoint(base)
    other = write_checkpoint(tmp_path / "other", llama_weights())
    Journal.begin(other, ["another.safetensors"], {}, 10).release()
    open_checkpoint(other)


# Journals from elsewhere ----------------------------------------------------------------------


def left_behind(folder: Path, *blocks: Block) -> Path:
    """A journal with these blocks changed, left by a process that died."""
    journal = begin(folder)
    for block in blocks:
        journal.change(block, lambda *_, b=block: overwrite(folder, b))
    journal.release()
    return folder / JOURNAL


@pytest.mark.parametrize("name", ["../victim", "/etc/hostname", "victim", "link", ".hidden"])
def test_a_journal_reaches_no_file_but_its_own(folder: Path, name: str) -> None:
    """It came with a downloaded folder, and recovering must not write where it says."""
    home = folder / "inside"
    home.mkdir()
    (home / "file").write_bytes(OLD)
    (folder / "victim").write_bytes(OLD)
    (home / "link").symlink_to(folder / "victim")
    path = left_behind(home)
    if name == "link":
        facts = json.loads((path / "journal.json").read_text()) | {"files": ["file", "link"]}
        (path / "journal.json").write_text(json.dumps(facts))
    block = vars(Block(name, 0, 100, 1))
    (path / "guard-0-x").write_bytes(b"".join(framed(block, NEW)))
    journal = Journal.take(home)
    assert journal is not None
    with pytest.raises(MalformedFile, match="not written by loratool"):
        journal.undo(lambda _: None)
    journal.release()
    assert (folder / "victim").read_bytes() == OLD
    (path / "guard-0-x").unlink()
    entry = {"block": block, "done": True, "new": 0, "old": 0}
    (path / "log").write_bytes(b"".join(framed(entry, b"")))
    with pytest.raises(MalformedFile, match="not written by loratool"):
        Journal.take(home)


@pytest.mark.parametrize(
    "facts",
    [
        *("", "{", "[]", "5", "{}", '{"files": 5}', '{"files": [""]}', '{"files": [".."]}'),
        *('{"files": ["../x"]}', '{"files": ["/x"]}', '{"files": ["x/y"]}'),
    ],
)
def test_what_a_journal_says_of_itself_may_be_anything(folder: Path, facts: str) -> None:
    path = left_behind(folder)
    (path / "journal.json").write_text(facts)
    with pytest.raises(MalformedFile, match="not one that this loratool wrote"):
        Journal.take(folder)
    with pytest.raises(Unfinished):
        open_weight_file(folder / "file")


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_damaged_log_is_not_taken_for_one_cut_short(folder: Path, place: str) -> None:
    """Entries after the damage would be lost, and their blocks stay changed without a word."""
    path = left_behind(folder, FIRST, SECOND)
    log = bytearray((path / "log").read_bytes())
    log[30 if place == "first" else -5] ^= 1
    (path / "log").write_bytes(log)
    with pytest.raises(MalformedFile, match="is damaged"):
        Journal.take(folder)
    assert (path / "log").read_bytes() == log


def test_a_hidden_file_can_be_changed_in_place(folder: Path) -> None:
    (folder / ".file").write_bytes(OLD)
    Journal.begin(folder, [".file"], {}, 1000).release()
    block = Block(".file", 0, 100, 1)
    journal = Journal.take(folder)
    assert journal is not None
    journal.change(block, lambda *_: overwrite(folder, block))
    journal.undo(lambda _: None)
    assert (folder / ".file").read_bytes() == OLD
    assert not (folder / JOURNAL).exists()


def test_a_journal_copied_without_its_empty_lock(folder: Path) -> None:
    path = left_behind(folder, FIRST)
    (path / "lock").unlink()
    journal = Journal.take(folder)
    assert journal is not None
    journal.undo(lambda _: None)
    assert (folder / "file").read_bytes() == OLD
