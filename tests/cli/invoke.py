"""Running the command line inside the test's own process, as main() does it."""

from __future__ import annotations

import contextlib
import io
import re
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


_COUNTED = re.compile(
    r".{0,60}(?<![\d.,–×:])\b1 (?:[a-z]+ )?(?:adapter|bia|biase|entrie|expert|file|layer|matrice"
    r"|module|parameter|row|shard|table|tensor|token|update|value|weight|worker)s\b.{0,20}"
)


@contextlib.contextmanager
def small_files_only(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def invoke(*arguments: object, most: int = MOST_BYTES_WRITTEN) -> Ended:
    """Run ``loratool ARGUMENTS`` and wait for its exit. most: bytes of any one file written.

    Whatever it says, one is no plural.
    """
    out, err = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with small_files_only(most), redirected[0], redirected[1]:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            said = out.getvalue() + err.getvalue()
            assert not (plural := _COUNTED.search(said)), f"one, and yet a plural: {plural[0]}"
            return Ended(ended.code, out.getvalue(), err.getvalue())
    raise AssertionError("main() returned without an exit code")
