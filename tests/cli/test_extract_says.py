"""What extract says where there is little to say."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.builders import llama_weights, write_checkpoint
from tests.cli.invoke import invoke

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def pair(folder: Path, *changed: str) -> list[Path]:
    weights = llama_weights()
    tuned = {n: w + 0.1 * torch.randn(w.shape).to(w) * (n in changed) for n, w in weights.items()}
    return [
        write_checkpoint(folder / "a-base-of-some-length", weights),
        write_checkpoint(folder / "a-tuned-of-some-length", tuned),
    ]


def test_a_change_of_one_matrix(tmp_path: Path) -> None:
    sides = pair(tmp_path, Q)
    ended = invoke("extract", *sides, "-o", tmp_path / "out", "--rank", "2", "--dry-run=ranks")
    assert ended.out.startswith("1 changed matrix, factors in")
    ended = invoke("extract", *sides, "-o", tmp_path / "out", "--rank", "2")
    assert ended.out.splitlines()[0].startswith(f"{tmp_path / 'out'}: rank 2, ")
    assert ended.out.splitlines()[0].endswith("computed on cpu"), "a title is not folded"


def test_no_table_without_rows(tmp_path: Path) -> None:
    sides = pair(tmp_path, NORM)
    ended = invoke("extract", *sides, "-o", tmp_path / "out", "--rank", "2", "--dry-run=ranks")
    assert (ended.code, ended.out) == (0, "no matrix that would be factorised has changed\n")
    ended = invoke("extract", *sides, "-o", tmp_path / "out", "--rank", "2")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].endswith("; no matrix is factorised")
    assert "module" not in ended.out
