"""Standard output that takes no more: what was not printed is an error, never a success."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import write_checkpoint

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", [["--version"], ["inspect", "model"], ["inspect", "model", "--json"]]
)
def test_a_full_disk_is_said(command: list[str], unbuffered: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"a.weight": torch.ones(2, 2)})
    with open(FULL, "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "loratool", *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 5
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith("No space left on device\n")
    assert len(ended.stderr.splitlines()) == 1
