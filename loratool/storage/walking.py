"""The files below a folder, however it is linked and whoever may read it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """One folder: the names of its regular files, links to such among them, in order.

    problem: why it could not be read, else None.
    """

    folder: Path
    files: tuple[str, ...]
    problem: str | None = None


def walk(root: Path) -> Iterator[Listing]:
    """``root`` and every folder below, each once, whatever links lead back to it.

    Hidden files and folders are left out. Folders that lie below ``root`` come before those that
    only links lead to, so that a folder is named by where it is.
    """
    seen: set[tuple[int, int]] = set()
    real, linked = deque([root]), deque[Path]()
    while real or linked:
        folder = real.popleft() if real else linked.popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as items:
                entries = sorted(items, key=lambda item: item.name)
        except OSError as error:
            yield Listing(folder, (), error.strerror or str(error))
            continue
        files = []
        for item in entries:
            if item.name.startswith("."):
                continue
            try:
                if item.is_dir(follow_symlinks=False):
                    real.append(folder / item.name)
                elif item.is_dir():
                    linked.append(folder / item.name)
                elif item.is_file():
                    files.append(item.name)
            except OSError:  # a link that leads nowhere, or in a circle
                continue
        yield Listing(folder, tuple(files))
