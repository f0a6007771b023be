"""Running loratool in a process of its own, as users do, without importing torch every time.

huggingface_hub reads its environment when it is imported, so a test that changes HF_ENDPOINT needs
a process in which that has not happened yet. A prepared process has torch loaded and nothing of
the Hub; each run is a fork of it with its own environment, output and exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """One run of a program."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(command: Sequence[str], env: Mapping[str, str]) -> Result:
    """A program in a process of its own."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


class PreparedProcess:
    """A Python process with torch loaded that forks itself for each run of loratool."""

    def __init__(self, folder: Path):
        self._out, self._err = folder / "out", folder / "err"

    def __enter__(self) -> PreparedProcess:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, arguments: Sequence[str], env: Mapping[str, str | None]) -> Result:
        """``loratool ARGUMENTS`` with exactly this environment, in the current folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {
            "arguments": list(arguments),
            "env": {key: value for key, value in env.items() if value is not None},
            "folder": os.getcwd(),
            "out": str(self._out),
            "err": str(self._err),
        }
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return Result(code, self._out.read_text(), self._err.read_text())


def _serve() -> None:
    import torch  # noqa: F401

    assert "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(asked: dict[str, Any]) -> None:
    code = 70
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["folder"])
        from loratool.cli.main import main

        main(asked["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
