"""Whole files into an output: by sharing their blocks, by copying, or as hard links where asked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from loratool.errors import OutputError
from loratool.storage.disk import disk_errors
from loratool.storage.sharing import clone_file
from loratool.storage.writing import copy_range


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, sharing its blocks where possible. Its permissions are not copied."""
    if clone_file(source, target):
        return
    with disk_errors(target):
        open(target, "xb").close()
    copy_range(source, 0, target, 0, source.stat().st_size)


def link_file(source: Path, target: Path) -> None:
    """A second name for the file behind ``source``. Raises OutputError across file systems."""
    with disk_errors(target):
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise OutputError(
                f"{target}: cannot be a hard link: {source} is on another file system",
                hint="leave out --link, or choose an output beside the base",
            ) from None
