"""Files that share blocks (reflinks), on the file systems of Linux that have them.

A shared range takes no room and no time, and stays as it is whatever is written to the other file.
Elsewhere nothing happens here, and the caller copies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from pathlib import Path

from loratool.storage.disk import NO_SPACE, disk_errors

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
"""Requests of ioctl(2): share a whole file's blocks, or those of a range."""
_BLOCK = 4096
_LEAST_BYTES = 2**16


def clone_file(source: Path, target: Path) -> bool:
    """Make ``target``, which must not exist, share all blocks of ``source``, if that can be done.

    False, and no file, where it cannot.
    """
    if sys.platform != "linux":
        return False
    with open(source, "rb") as reader, disk_errors(target), open(target, "xb") as writer:
        if _shared(writer.fileno(), _FICLONE, reader.fileno()):
            return True
        os.unlink(target)
        return False


def share_blocks(source: int, start: int, target: Path, offset: int, nbytes: int) -> range:
    """Make the whole blocks of a range of ``target`` those of a range of the open file ``source``.

    Returns the positions, counted from the range's beginning, that need no copying any more.
    """
    first, last = -offset % _BLOCK, nbytes - (offset + nbytes) % _BLOCK
    if sys.platform != "linux" or (offset - start) % _BLOCK or last - first < _LEAST_BYTES:
        return range(0)
    request = struct.pack("<qQQQ", source, start + first, last - first, offset + first)
    with open(target, "r+b", buffering=0) as writer:
        if _shared(writer.fileno(), _FICLONERANGE, request):
            return range(first, last)
    return range(0)


def _shared(writer: int, request: int, argument: int | bytes) -> bool:
    try:
        fcntl.ioctl(writer, request, argument)
    except OSError as error:
        if error.errno in (*NO_SPACE, errno.EIO):
            raise
        return False
    return True
