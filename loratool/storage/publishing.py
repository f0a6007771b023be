"""A single small file that appears whole or not at all: pages, pictures."""

from __future__ import annotations

import os
from pathlib import Path

from loratool.errors import OutputError, OutputExists
from loratool.storage.outputs import check_place, staged


def check_file(path: Path, beginnings: tuple[bytes, ...], *, overwrite: bool) -> None:
    """Refuse a place that is taken; with overwrite, one that holds another kind of file.

    beginnings: what files of this kind begin with. Raises OutputExists, OutputError.
    """
    check_place(path)
    if not path.is_symlink() and not path.exists():
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, not a file to write")
    if not overwrite:
        raise OutputExists(
            f"{path}: exists already", hint="pass --overwrite to replace it, or name another file"
        )
    if not path.is_file() or not _begins(path, beginnings):
        raise OutputError(
            f"{path}: is a file of another kind; it will not be replaced",
            hint="name another file, or remove it yourself",
        )


def _begins(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    with open(path, "rb") as file:
        start = file.read(max(map(len, beginnings)))
    return not start or any(start.lower().startswith(known.lower()) for known in beginnings)


def publish_file(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a file beside its place, flush it, and rename it. Raises OutputError, OutputExists."""
    with staged(path) as staging:
        name = os.path.basename(os.path.abspath(path))
        (staging.out / name).write_bytes(content)
        staging.publish(overwrite=overwrite, only_file=name)
