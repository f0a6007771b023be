"""Changing files where they lie, so that a kill at any byte can be undone or finished.

The journal is a folder beside the files. A block of a file is changed only while its original
bytes lie in the journal, flushed (``guard``). Once the new bytes are flushed too, what leads back
from them to the original is appended to the log, far smaller where the change is small, and the
original bytes go. So the log undoes finished blocks, and guards undo those in between. Undoing
takes the same steps, and may be killed as well.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loratool.errors import MalformedFile, OutputError
from loratool.storage.differences import pack_difference, unpack_difference
from loratool.storage.disk import disk_errors, sync_folder
from loratool.storage.frames import framed, has_frame, next_frame
from loratool.storage.journal_holder import (
    FACTS,
    HELD,
    JOURNAL,
    LOCK,
    OVER,
    SETUP,
    claim,
    read_facts,
    remove_remains,
    try_lock,
)
from loratool.storage.writing import copy_range, write_at

Result = TypeVar("Result")

_LOG = "log"
_RESERVE = "reserve"
_GUARD = "guard-"


@dataclass(frozen=True)
class Block:
    """A byte range of one file of the journal's folder, of elements ``width`` bytes wide."""

    file: str
    offset: int
    nbytes: int
    width: int

    @property
    def key(self) -> str:
        return f"{self.file}@{self.offset}+{self.nbytes}"


@dataclass(frozen=True)
class State:
    """What a journal holds: facts as given at its start, blocks changed and blocks in between."""

    facts: Mapping[str, Any]
    done: tuple[Block, ...]
    between: tuple[Block, ...]


class Journal:
    """The locked journal of one folder. Blocks may be changed from several threads."""

    def __init__(self, folder: Path, lock: int):
        self.folder = folder
        self.path = folder / JOURNAL
        self._lock = lock
        self._logging = threading.Lock()
        self._states: dict[str, tuple[bool, Block, int]] = {}
        self.facts: Mapping[str, Any] = read_facts(folder)
        self._files = frozenset(self.facts["files"])
        self._read_log()
        HELD.add(folder)

    @staticmethod
    def begin(
        folder: Path, files: Sequence[str], facts: Mapping[str, Any], reserve: int
    ) -> Journal:
        """Start one. ``reserve`` bytes are set aside, so that a full disk can be undone.

        Raises OutputError when the folder has one already, from a dead process or a living one.
        """
        folder = folder.resolve()
        with disk_errors(folder):
            remove_remains(folder)
            setup = folder / f"{SETUP}{os.getpid()}-{os.urandom(4).hex()}"
            setup.mkdir()
            lock = os.open(setup / LOCK, os.O_CREAT | os.O_RDWR)
            place = setup
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                _write_flushed(setup / _RESERVE, [b"\0" * reserve])
                text = json.dumps({**facts, "files": list(files)})
                _write_flushed(setup / FACTS, [text.encode()])
                sync_folder(setup)
                claim(setup, folder)
                place = folder / JOURNAL
                sync_folder(folder)
            except BaseException:
                os.close(lock)
                shutil.rmtree(place, ignore_errors=True)
                raise
        return Journal(folder, lock)

    @staticmethod
    def take(folder: Path) -> Journal | None:
        """The journal that a dead process left in ``folder``, or None.

        Raises OutputError while its process lives, MalformedFile where it is not a journal or is
        damaged.
        """
        folder = folder.resolve()
        path = folder / JOURNAL
        if not path.is_dir():
            return None
        lock = try_lock(path)
        if lock is None:
            raise OutputError(
                f"{folder}: is being changed in place by a running loratool",
                hint="wait until it has finished",
            )
        try:
            return Journal(folder, lock)
        except BaseException:
            os.close(lock)
            raise

    def release(self) -> None:
        """Let go of the journal without ending it."""
        HELD.discard(self.folder)
        os.close(self._lock)

    @property
    def state(self) -> State:
        guarded = [block for block, _ in self._guards()]
        keys = {block.key for block in guarded}
        done = [block for is_done, block, _ in self._states.values() if is_done]
        return State(self.facts, tuple(b for b in done if b.key not in keys), tuple(guarded))

    def is_done(self, block: Block) -> bool:
        """Whether the block has its new bytes."""
        return self._states.get(block.key, (False,))[0]

    def own(self, name: str) -> None:
        """Make a file the folder's own where it is a link, so that no other name changes."""
        path = self.folder / name
        if not path.is_symlink() and path.stat().st_nlink == 1:
            return
        copy = self.path / f"own-{os.urandom(4).hex()}"
        with disk_errors(path):
            open(copy, "xb").close()
            copy_range(path, 0, copy, 0, path.stat().st_size)
            shutil.copymode(path, copy)
            _flush(copy)
            os.replace(copy, path)
            sync_folder(self.folder)

    def change(self, block: Block, work: Callable[[Path, int], Result]) -> Result:
        """Run ``work``, which overwrites the block and nothing else, under the journal's guard.

        ``work`` gets a file and the offset in it where the original bytes lie meanwhile.
        """
        original = self._bytes_of(block)
        guard = self._guard(block, original)
        result = work(guard, guard.stat().st_size - block.nbytes)
        with disk_errors(self.folder / block.file):
            _flush(self.folder / block.file)
        changed = self._bytes_of(block)
        self._log(block, True, pack_difference(original, changed, block.width), changed, original)
        os.unlink(guard)
        return result

    def settle(self) -> None:
        """Give blocks that were in between their original bytes again."""
        for block, original in self._guards():
            self._restore(block, original)
            self._log(block, False, b"", b"", b"")
            os.unlink(self._guard_path(block))

    def undo(self, advance: Callable[[int], None]) -> None:
        """Give all blocks their original bytes again and end the journal.

        ``advance`` is told the bytes that are done. Raises MalformedFile when something else has
        changed the files meanwhile.
        """
        with suppress(FileNotFoundError):
            os.unlink(self.path / _RESERVE)
        self.settle()
        for is_done, block, at in list(self._states.values()):
            if is_done:
                original = self._original(block, at)
                guard = self._guard(block, original)
                self._restore(block, original)
                self._log(block, False, b"", b"", b"")
                os.unlink(guard)
                advance(block.nbytes)
        self.end()

    def end(self) -> None:
        """Remove the journal: the files are as they shall be."""
        over = self.folder / f"{OVER}{os.urandom(4).hex()}"
        self.path.rename(over)
        sync_folder(self.folder)
        shutil.rmtree(over, ignore_errors=True)
        self.release()

    # Blocks ----------------------------------------------------------------------------------

    def _bytes_of(self, block: Block) -> bytes:
        with open(self.folder / block.file, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), block.nbytes, block.offset)
            while len(data) < block.nbytes:
                more = os.pread(file.fileno(), block.nbytes - len(data), block.offset + len(data))
                if not more:
                    raise MalformedFile(f"{self.folder / block.file}: shrank meanwhile")
                data += more
        return data

    def _restore(self, block: Block, original: bytes) -> None:
        path = self.folder / block.file
        write_at(path, block.offset, memoryview(original))
        with disk_errors(path):
            _flush(path)

    def _guard_path(self, block: Block) -> Path:
        return self.path / f"{_GUARD}{block.offset}-{block.file}"

    def _guard(self, block: Block, original: bytes) -> Path:
        path = self._guard_path(block)
        with disk_errors(path):
            try:
                _write_flushed(path, framed(vars(block), original))
                sync_folder(self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(path)
                raise
        return path

    def _guards(self) -> Iterator[tuple[Block, bytes]]:
        """Blocks in between and their original bytes; a guard cut short guarded nothing yet."""
        for path in sorted(self.path.glob(f"{_GUARD}*")):
            with open(path, "rb") as file:
                frame = next_frame(file.read)
            if frame is not None:
                block = self._block(frame[0])
                if len(frame[1]) != block.nbytes:
                    raise self._damaged(path)
                yield block, frame[1]

    def _block(self, entry: object) -> Block:
        """A block as it was written down. A journal may have come with the folder from elsewhere:
        what it speaks of must be files of the folder. Raises MalformedFile."""
        if not isinstance(entry, dict) or entry.keys() != {"file", "offset", "nbytes", "width"}:
            raise self._damaged(self.path)
        block = Block(**entry)
        numbers = (block.offset, block.nbytes, block.width)
        if not all(isinstance(one, int) and one >= 0 for one in numbers) or block.width < 1:
            raise self._damaged(self.path)
        if block.file not in self._files or (self.folder / block.file).is_symlink():
            raise self._damaged(self.path)
        return block

    @staticmethod
    def _damaged(path: Path) -> MalformedFile:
        return MalformedFile(
            f"{path}: is damaged, or was not written by loratool",
            hint="what was overwritten cannot be told; fetch the checkpoint's files again",
        )

    # Log -------------------------------------------------------------------------------------

    def _log(self, block: Block, done: bool, way_back: bytes, new: bytes, old: bytes) -> None:
        entry = {
            "block": vars(block),
            "done": done,
            "new": zlib.crc32(new),
            "old": zlib.crc32(old),
        }
        path = self.path / _LOG
        with self._logging, disk_errors(path), open(path, "ab") as file:
            start = file.tell()
            try:
                file.writelines(framed(entry, way_back))
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    os.truncate(path, start)
                raise
            self._states[block.key] = (done, block, start)

    def _read_log(self) -> None:
        path = self.path / _LOG
        if not path.exists():
            return
        with open(path, "r+b") as file:
            start = 0
            while (frame := next_frame(file.read)) is not None:
                block = self._block(frame[0].get("block"))
                self._states[block.key] = (frame[0].get("done") is True, block, start)
                start = file.tell()
            file.seek(start)
            rest = file.read()
            # entries are flushed one by one, so only the last can be cut short, and its guard is
            # still there
            if rest and (has_frame(rest[1:]) or not any(self._guards())):
                raise self._damaged(path)
            file.truncate(start)

    def _original(self, block: Block, at: int) -> bytes:
        with open(self.path / _LOG, "rb") as file:
            file.seek(at)
            frame = next_frame(file.read)
        new = self._bytes_of(block)
        if frame is None or zlib.crc32(new) != frame[0]["new"]:
            raise MalformedFile(
                f"{self.folder / block.file}: was changed by something else since",
                hint="the original bytes cannot be restored; fetch the file again",
            )
        original = unpack_difference(frame[1], new, block.width)
        if zlib.crc32(original) != frame[0]["old"]:
            raise self._damaged(self.path / _LOG)
        return original


@contextmanager
def undone_on_failure(journal: Journal) -> Iterator[None]:
    """Put everything back when the block fails; where even that fails, leave the journal."""
    try:
        yield
    except BaseException as failure:
        try:
            journal.undo(lambda _: None)
            failure.add_note("everything was put back as it was")
        except BaseException:
            journal.release()
            failure.add_note(f"loratool recover {journal.folder} finishes or undoes what was done")
        raise


def _write_flushed(path: Path, parts: Sequence[bytes]) -> None:
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
