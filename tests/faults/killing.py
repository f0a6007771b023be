"""A loratool that dies at a chosen step, or at a chosen moment.

Calls that change the disk (writing at a place, flushing, renaming, linking, removing …) are steps.
A child process, forked with everything loaded, counts them and kills itself with SIGKILL just
before or, where it writes, in the middle of step N; or a timer does, wherever it is then.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CALLS = ("fsync", "rename", "replace", "unlink", "link", "mkdir", "rmdir", "truncate", "symlink")
COUNT_ONLY = -1


def run(
    arguments: Sequence[object], die_at: int = COUNT_ONLY, seed: int = 0, die_after: float = 0
) -> tuple[int | None, int]:
    """``loratool ARGUMENTS`` in a forked child: its exit code, None if it died, and its steps.

    die_after: seconds until it is killed, if it has not ended by then.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # no thread of ours lives now
        child = os.fork()
    if child == 0:
        os.close(reading)
        if die_after:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, die_after)
        code = _child([str(word) for word in arguments], die_at, seed, writing)
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as lines:
        text = lines.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGALRM)
        return None, die_at
    return os.waitstatus_to_exitcode(status), int(text or 0)


def _child(arguments: list[str], die_at: int, seed: int, report: int) -> int:
    from loratool.cli.main import main

    steps = 0

    def step(half: Callable[[], Any] | None = None) -> None:
        nonlocal steps
        steps += 1
        if steps == die_at:
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*words: Any, **more: Any) -> Any:
            step()
            return call(*words, **more)

        return stepping

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    pwrite = os.pwrite

    def half_written(file: int, data: Any, offset: int) -> int:
        cut = (len(data) * (1 + (seed + steps) % 7)) // 8
        step(lambda: pwrite(file, bytes(data)[:cut], offset))
        return pwrite(file, data, offset)

    os.pwrite = half_written  # type: ignore[assignment]
    if hasattr(os, "copy_file_range"):
        os.copy_file_range = wrapped(os.copy_file_range)
    code: object = 70
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            try:
                main(arguments)
            except SystemExit as ended:
                code = ended.code
    os.write(report, str(steps).encode())
    if code:
        sys.__stderr__.write(err.getvalue())
    return code if isinstance(code, int) else 70


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
