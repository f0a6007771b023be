"""Running the command line inside the test's own process, as main() does it."""

from __future__ import annotations

import contextlib
import io
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from loratool.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it said."""

    code: object
    out: str
    err: str


MOST_BYTES_WRITTEN = 256 * 2**20
"""Of any one file, so that a missing check of the free space cannot fill the disk."""


@contextlib.contextmanager
def small_files_only(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def invoke(*arguments: object, most: int = MOST_BYTES_WRITTEN) -> Ended:
    """Run ``loratool ARGUMENTS`` and wait for its exit. most: bytes of any one file written."""
    out, err = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with small_files_only(most), redirected[0], redirected[1]:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return Ended(ended.code, out.getvalue(), err.getvalue())
    raise AssertionError("main() returned without an exit code")
