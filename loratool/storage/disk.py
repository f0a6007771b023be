"""The operating system's refusals to write, as errors that name the output."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loratool.errors import InputError, LoratoolError, NoSpace, OutputError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
ONLY_ON_WRITING = (*NO_SPACE, errno.EFBIG, errno.EROFS)
"""What the system says of an output, never of an input."""


def refusal(error: OSError) -> LoratoolError:
    """What the system said, where nothing has named the output: an error about an input, mostly."""
    where = f"{error.filename}: " if error.filename else ""
    kind = OutputError if error.errno in ONLY_ON_WRITING else InputError
    return kind(f"{where}{error.strerror or error}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise NoSpace(
                f"{path}: no space left on the disk", hint="free some and try again"
            ) from error
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, as fsync puts a file's bytes there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
