"""Where commands run: closed streams, and paths that a shell has left as they were typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders import write_checkpoint
from tests.cli.invoke import invoke


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams(closed: tuple[int, ...], tmp_path: Path) -> None:
    """The command does its work, and no file of it is taken for a stream."""
    write_checkpoint(tmp_path / "base", {"a.weight": torch.ones(4, 4)})
    write_checkpoint(tmp_path / "tuned", {"a.weight": torch.eye(4)})
    shut = " ".join(f"{number}>&-" for number in closed)
    command = f"{sys.executable} -m loratool extract base tuned -o out --rank 1 {shut}"
    ended = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert ended.returncode == 0
    assert (ended.stdout == "") == (1 in closed)
    assert "Traceback" not in ended.stderr
    files = ("adapter_config.json", "adapter_model.safetensors", "loratool_report.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(files)
    again = invoke(
        "verify", tmp_path / "out", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned"
    )
    assert again.code == 0


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--output=~/x`` is no folder called ~ where one happens to be."""
    home, here = tmp_path / "home", tmp_path / "here"
    for name in ("base", "tuned"):
        values = {"a.weight": torch.ones(4, 4) if name == "base" else torch.eye(4)}
        write_checkpoint(home / name, values)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert invoke("extract", "~/base", "~/tuned", "--output=~/adapter", "--rank", 1).code == 0
    assert invoke("merge", "~/base", "~/adapter:0.5", "--output=~/merged").code == 0
    assert invoke("inspect", "~nobody-of-that-name/x").code == 3
    assert not any(here.iterdir())
    assert (home / "adapter").is_dir()
    (here / "~").mkdir()
    assert (
        invoke("extract", home / "base", home / "tuned", "--output=~/adapter", "--rank", 1).code
        == 0
    )
    assert (here / "~" / "adapter").is_dir()
