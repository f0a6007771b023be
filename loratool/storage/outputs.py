"""Outputs that appear whole or not at all.

Everything is written into a staging folder beside the final place, flushed to disk, and renamed
into place by ``publish``. The staging folder is locked while its process lives; one left behind
by a killed process is removed, or taken over, by the next run for the same output.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import NoSpace, OutputError, OutputExists
from loratool.storage.checkpoint import WEIGHT_SUFFIXES
from loratool.storage.disk import ONLY_ON_WRITING, disk_errors, sync_folder
from loratool.storage.done_log import append_done
from loratool.storage.journal_holder import JOURNAL

_STAGING_MARK = ".loratool-partial-"
_SETUP_MARK = ".loratool-setup-"
_SETUP_SECONDS = 600
_FLUSH_SECONDS = 1.0
_LOCK = ".lock"
_KEY = ".key"
_REPLACED = "replaced"


def check_free_space(output: Path, needed: int) -> None:
    """Refuse early when the disk that will hold ``output`` has less than ``needed`` bytes.

    What a dead run left for the same output counts as free: it is taken over or removed.
    """
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free + _bytes_left(Path(os.path.abspath(output)))
    if needed > free:
        raise NoSpace(
            f"{output}: needs {needed:,} bytes, its disk has {free:,} free",
            hint="free some space, or choose an output on another disk",
        )


def check_place(path: Path) -> None:
    """Refuse what would lie in a folder that can neither be written to nor made.

    Raises OutputError.
    """
    with disk_errors(path):
        folder = _existing_parent(Path(os.path.abspath(path)).parent)
    if not folder.is_dir():
        raise OutputError(f"{path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the folder {folder} cannot be written to")


def check_output(output: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that exists (unless overwrite), or that touches an input.

    Raises OutputExists or OutputError before anything is computed.
    """
    check_place(output)
    resolved = _real(output)
    for source in inputs:
        origin = _real(source)
        if resolved == origin:
            raise OutputError(f"{output}: is one of the inputs; choose another output")
        if resolved.is_relative_to(origin):
            raise OutputError(f"{output}: lies inside the input {source}; choose another output")
        if origin.is_relative_to(resolved):
            raise OutputError(f"{output}: holds the input {source}; choose another output")
    with disk_errors(output):
        is_there = output.is_symlink() or output.exists()
    if is_there:
        if not overwrite:
            raise OutputExists(
                f"{output}: exists already", hint="pass --overwrite to replace it, or another -o"
            )
        _check_replaceable(output)


def _real(path: Path) -> Path:
    """Without links; of a loop of links, itself."""
    return Path(os.path.realpath(path))


def _check_replaceable(output: Path) -> None:
    """--overwrite replaces what looks like a model or an adapter, never somebody's other files."""
    if (output / JOURNAL).exists():
        raise OutputError(
            f"{output}: was being changed in place when the work was interrupted",
            hint=f"loratool recover {output} says what was done, and finishes or undoes it",
        )
    if output.is_symlink() or (output.suffix in WEIGHT_SUFFIXES and output.is_file()):
        return
    if not output.is_dir():
        raise OutputError(
            f"{output}: is no weight file; it will not be replaced",
            hint="choose another -o, or remove it yourself",
        )
    if _real(Path.cwd()).is_relative_to(_real(output)):
        raise OutputError(
            f"{output}: is the folder that you are in, or holds it; it will not be replaced",
            hint="choose another -o, or leave the folder first",
        )
    if not any(output.iterdir()):
        return
    ours = ("adapter_config.json", "config.json", "model_index.json")
    looks_right = any((output / name).is_file() for name in ours) or any(
        item.suffix in (".safetensors", ".bin") for item in output.iterdir()
    )
    if not looks_right:
        raise OutputError(
            f"{output}: is a folder that holds no model or adapter; it will not be replaced",
            hint="choose another -o, or remove the folder yourself",
        )


@contextmanager
def staged(output: Path, resume_key: str | None = None) -> Iterator[Staging]:
    """A staging folder for ``output``, removed again unless ``publish`` was called.

    With a ``resume_key``, a folder that an interrupted or killed run with the same key left is
    taken over with all that is in it; without, or with another key, it is removed.
    """
    output = Path(os.path.abspath(output))
    made = [parent for parent in output.parents if not parent.exists()]
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _take_leftover(output, resume_key) or _new_folder(output, resume_key)
    keep = False
    try:
        yield Staging(folder, output)
    except KeyboardInterrupt as interrupt:
        keep = resume_key is not None
        if keep:
            interrupt.add_note(f"the same command goes on from {folder}")
        raise
    except OSError as error:
        if error.errno in ONLY_ON_WRITING:  # only an output can meet these
            with disk_errors(output):
                raise
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


@dataclass(frozen=True)
class Staging:
    """Where an output takes shape. ``folder / "out"`` becomes the output; the rest is scratch."""

    folder: Path
    output: Path

    @property
    def out(self) -> Path:
        path = self.folder / "out"
        path.mkdir(exist_ok=True)
        return path

    def clear_out(self) -> None:
        """Forget what a run that was taken over had put there."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)

    @property
    def scratch(self) -> Path:
        path = self.folder / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def publish(self, *, overwrite: bool, only_file: str | None = None) -> None:
        """Flush everything and rename it into place.

        With ``only_file`` the output is that one file of the staged folder, not the folder.
        Raises OutputExists when something appeared there meanwhile.
        """
        with disk_errors(self.output):
            _sync_tree(self.out)
            source = self.out / only_file if only_file else self.out
            aside = self.folder / _REPLACED
            exists = self.output.is_symlink() or self.output.exists()
            if exists and not overwrite:
                raise OutputExists(f"{self.output}: appeared while it was being made")
            if exists:
                os.rename(self.output, aside)
            try:
                os.rename(source, self.output)
            except OSError:
                if exists:
                    os.rename(aside, self.output)
                raise
            sync_folder(self.output.parent)


@dataclass
class FinishedWork:
    """Jobs that are done, waiting to be recorded once their data is on the disk."""

    log: Path
    _waiting: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, job: str, result: Any) -> None:
        """Say that ``job`` is done. Called from any thread."""
        with self._lock:
            self._waiting[job] = result

    def take(self) -> dict[str, Any]:
        """The jobs added since the last time."""
        with self._lock:
            taken, self._waiting = self._waiting, {}
            return taken


@contextmanager
def flushing(paths: Sequence[Path], finished: FinishedWork) -> Iterator[None]:
    """Send what is written to ``paths`` to the disk while more is being computed.

    Finished jobs are recorded after each round, so none waits for the disk. Only a head start:
    ``publish`` flushes everything again and reports what fails.
    """
    over = threading.Event()

    def flush() -> None:
        handles = [os.open(path, os.O_RDWR) for path in paths]
        try:
            while not over.wait(_FLUSH_SECONDS):
                jobs = finished.take()
                for handle in handles:
                    os.fsync(handle)
                if jobs:
                    append_done(finished.log, jobs)
        except OSError:
            pass
        finally:
            for handle in handles:
                os.close(handle)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, until one is in use."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _new_folder(output: Path, resume_key: str | None) -> tuple[Path, int]:
    """A locked folder. It gets the name by which others find it only once it is locked."""
    tail = f"{os.getpid()}-{os.urandom(4).hex()}"
    unlocked = output.parent / f".{output.name}{_SETUP_MARK}{tail}"
    unlocked.mkdir()
    lock = os.open(unlocked / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if resume_key is not None:
        (unlocked / _KEY).write_text(resume_key)
    folder = output.parent / f".{output.name}{_STAGING_MARK}{tail}"
    unlocked.rename(folder)
    return folder, lock


def _take_leftover(output: Path, resume_key: str | None) -> tuple[Path, int] | None:
    """A dead run's folder with this key, locked; dead folders with other keys are removed."""
    prefix = f".{_glob_escape(output.name)}"
    for folder in output.parent.glob(f"{prefix}{_SETUP_MARK}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _SETUP_SECONDS:
                shutil.rmtree(folder)
    taken = None
    for folder in output.parent.glob(f"{prefix}{_STAGING_MARK}*"):
        lock = _lock_if_dead(folder)
        if lock is None:
            continue
        key = folder / _KEY
        fits = resume_key is not None and key.is_file() and key.read_text() == resume_key
        _give_back(folder / _REPLACED, output)
        if fits and taken is None:
            taken = folder, lock
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    return taken


def _give_back(replaced: Path, output: Path) -> None:
    """A run that died between the two renames of ``publish`` left the old output aside."""
    if (replaced.exists() or replaced.is_symlink()) and not output.exists():
        replaced.rename(output)


def _bytes_left(output: Path) -> int:
    """Room that dead runs for the same output hold."""
    held = 0
    for folder in output.parent.glob(f".{_glob_escape(output.name)}{_STAGING_MARK}*"):
        lock = _lock_if_dead(folder)
        if lock is not None:
            held += sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))
            os.close(lock)
    return held


def _lock_if_dead(folder: Path) -> int | None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return None  # being removed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None  # alive
    return lock


def _glob_escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return path
