"""Wall time and peak memory of one child process. Imports nothing heavy, on purpose.

A child starts as a copy of its parent, and the kernel counts that copy in the child's peak; a
parent without torch keeps the figure honest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
_SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Run:
    """One finished command.

    seconds: from its start until its output is on the disk. cpu_seconds: how long it kept
    processors busy, which other load on the machine disturbs less. peak_bytes: largest resident
    set, as the kernel recorded it, file pages that the process had mapped included.
    anonymous_bytes: largest resident set without those, sampled every 10 ms.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    stdout: str
    exit_code: int = 0

    def json(self) -> Any:
        """What the command printed, as JSON."""
        return json.loads(self.stdout)


def run(
    command: Sequence[str | Path], *, flush: Path | None = None, enough: Path | None = None
) -> Run:
    """Run a command, then flush the files under ``flush``; that counts in the time.

    Everything written before is flushed first, so that no command pays for another's data.
    Raises CalledProcessError, with what the command printed, when it fails; a command that has
    written the file ``enough`` before it failed has done its work, and its exit code is noted.
    """
    os.sync()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err)
        sampler = _Sampler(child.pid)
        sampler.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if flush is not None:
            flush_files(flush)
        seconds = time.perf_counter() - start
        sampler.stop()
        out.seek(0)
        err.seek(0)
        if child.returncode and not (enough and enough.exists()):
            sys.stderr.write(err.read())
            raise subprocess.CalledProcessError(child.returncode, child.args, out.read())
        unit = 1 if sys.platform == "darwin" else 1024
        busy = usage.ru_utime + usage.ru_stime
        peak = usage.ru_maxrss * unit
        return Run(seconds, busy, peak, sampler.peak_bytes, out.read(), child.returncode)


def python(script: str, *arguments: str | Path) -> list[str | Path]:
    """The command line of a script beside this file."""
    return [sys.executable, HERE / script, *arguments]


def loratool(*arguments: str | Path) -> list[str | Path]:
    """The command line of loratool, as installed here."""
    return [sys.executable, "-m", "loratool", *arguments]


def flush_files(path: Path) -> None:
    """fsync a file, or a folder and all it holds."""
    items = [path, *path.rglob("*")] if path.is_dir() else [path]
    for item in items:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_once(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as handle:
                while handle.read(2**24):
                    pass


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def note(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


class _Sampler(threading.Thread):
    """Follows the anonymous memory of a process, where /proc shows it."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            try:
                text = self._status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    self.peak_bytes = max(self.peak_bytes, 1024 * int(line.split()[1]))

    def stop(self) -> None:
        self._over.set()
        self.join()
