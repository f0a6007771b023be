"""Whose journal a folder has: begun, held by a living process, left by a dead one, or over."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from loratool.errors import OutputError, Unfinished

JOURNAL = ".loratool-in-place"
SETUP = ".loratool-in-place-setup-"
OVER = ".loratool-in-place-over-"
LOCK = "lock"
FACTS = "journal.json"
HELD: set[Path] = set()
"""Folders whose journal this process holds: it may read the files."""


def refuse_unfinished(path: Path) -> None:
    """Refuse a file that an unfinished journal beside it speaks of. Raises Unfinished."""
    journal = path.parent / JOURNAL
    if not journal.is_dir() or path.parent.resolve() in HELD:
        return
    try:
        files = json.loads((journal / FACTS).read_text())["files"]
    except (OSError, ValueError, KeyError):
        files = [path.name]
    if path.name not in files:
        return
    lock = try_lock(journal)
    if lock is None:
        raise Unfinished(
            f"{path}: is being changed in place by a running loratool",
            hint="wait until it has finished",
        )
    os.close(lock)
    raise Unfinished(
        f"{path}: was being changed in place when the work was interrupted",
        hint=f"loratool recover {path.parent} says what was done, and finishes or undoes it",
    )


def claim(setup: Path, folder: Path) -> None:
    """Make ``setup`` the journal of ``folder``. Raises OutputError, Unfinished where it has one."""
    journal = folder / JOURNAL
    try:
        os.rename(setup, journal)
    except OSError:
        if not journal.is_dir():
            raise
        lock = try_lock(journal)
        if lock is None:
            raise OutputError(
                f"{folder}: is being changed in place by another loratool",
                hint="wait until it has finished",
            ) from None
        os.close(lock)
        raise Unfinished(
            f"{folder}: an earlier change in place was interrupted here",
            hint=f"loratool recover {folder} says what was done, and finishes or undoes it",
        ) from None


def remove_remains(folder: Path) -> None:
    """What processes left that died before their journal began, or after it had ended."""
    for path in [*folder.glob(f"{SETUP}*"), *folder.glob(f"{OVER}*")]:
        with suppress(OSError):
            if path.name.startswith(OVER) or time.time() - path.stat().st_mtime > 600:
                shutil.rmtree(path)


def try_lock(journal: Path) -> int | None:
    """The journal's lock, or None where a living process has it."""
    try:
        lock = os.open(journal / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
