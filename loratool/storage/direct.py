"""Large writes that go past the page cache, where the system and the disk allow it.

What a merge or an extraction writes is not read again soon, and every page of cache for it would
be allocated, filled, and taken from files that are. Written directly, the bytes are on their way
to the disk at once and cost hardly any processor time; a thread waits for them, so there should
be more threads than cores. Linux wants offset, length and memory aligned to blocks; the ragged
ends of a range are left to the cache. No page is written both ways at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from loratool.storage.disk import NO_SPACE

ALIGNMENT = max(4096, mmap.PAGESIZE)
LEAST_BYTES = 2**20
"""Shorter ranges are left to the page cache."""

_CHUNK_BYTES = 4 * 2**20
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_BTRFS = 0x9123683E
_REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)

Fill = Callable[[memoryview, int], int]
"""Puts the bytes from a position of the range on into the buffer, and says how many; 0 at an
unexpected end."""


def write_direct(path: Path, offset: int, nbytes: int, fill: Fill) -> range:
    """Write what of the bytes ``offset : offset + nbytes`` of a file can go to the disk directly.

    Returns the positions, counted from ``offset``, that were written; the caller writes the rest.
    Raises OSError when the disk is full or broken.
    """
    start = -offset % ALIGNMENT
    stop = nbytes - (offset + nbytes) % ALIGNMENT
    flag = getattr(os, "O_DIRECT", None)
    if flag is None or stop - start < LEAST_BYTES:
        return range(0)
    try:
        file = os.open(path, os.O_WRONLY | flag)
    except OSError:
        return range(0)  # this file system has no such thing
    try:
        position = start
        while position < stop:
            buffer = _MEMORY.chunk(min(_CHUNK_BYTES, stop - position))
            count = fill(buffer, position) // ALIGNMENT * ALIGNMENT
            written = os.pwrite(file, buffer[:count], offset + position) if count else 0
            position += written // ALIGNMENT * ALIGNMENT
            if not written or written % ALIGNMENT:
                break
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    finally:
        os.close(file)
    return range(start, position)


def reserve(file: int, nbytes: int) -> None:
    """Give a new file its blocks on the disk at once, where the file system can.

    Threads can then write to it side by side: what has to find blocks first goes one at a time.
    Raises OSError when the disk is full. (``os.posix_fallocate`` would write zeros instead where
    the file system cannot.) Btrfs shares blocks with other files instead, and would keep all that
    was reserved for as long as one block of it is used.
    """
    fallocate = getattr(_LIBC, "fallocate64", None)
    if fallocate is None or not nbytes or _file_system(file) == _BTRFS:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file, 0, 0, nbytes) and (code := ctypes.get_errno()) in NO_SPACE:
        os.ftruncate(file, 0)  # gives back what it took before there was no more
        raise OSError(code, os.strerror(code))


def _file_system(file: int) -> int | None:
    """The magic number of the file system that an open file is on, by statfs(2)."""
    about = ctypes.create_string_buffer(256)
    statfs = getattr(_LIBC, "fstatfs64", None)
    if statfs is None or statfs(ctypes.c_int(file), about):
        return None
    return int.from_bytes(about.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


class _Memory(threading.local):
    """Page-aligned memory, one piece for each thread."""

    def __init__(self) -> None:
        self._buffer: memoryview | None = None

    def chunk(self, nbytes: int) -> memoryview:
        if self._buffer is None:
            self._buffer = memoryview(mmap.mmap(-1, _CHUNK_BYTES))
        return self._buffer[:nbytes]


_MEMORY = _Memory()
