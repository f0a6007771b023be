"""Whose journal a folder has: begun, held by a living process, left by a dead one, or over."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from loratool.errors import MalformedFile, OutputError, Unfinished

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
        files = read_facts(path.parent)["files"]
    except MalformedFile:
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


def read_facts(folder: Path) -> dict[str, Any]:
    """What a folder's journal says of itself; its ``files`` are of that folder. A journal may have
    come with the folder from elsewhere. Raises MalformedFile."""
    try:
        facts = json.loads((folder / JOURNAL / FACTS).read_text())
    except (OSError, ValueError, RecursionError):
        facts = None
    names = facts.get("files") if isinstance(facts, dict) else None
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name == Path(name).name and name not in ("", "..")
        for name in names
    ):
        raise MalformedFile(f"{folder}: its journal is not one that this loratool wrote")
    return dict(facts)


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
        lock = os.open(journal / LOCK, os.O_RDWR | os.O_CREAT)  # a copy may lack the empty file
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
