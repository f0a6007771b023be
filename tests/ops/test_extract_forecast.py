"""What --dry-run says of an extraction holds for what is then written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.ops.extract_plan import plan_extract
from tests.builders import random_tensor
from tests.cli.invoke import invoke
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, moved, save_folder

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rank": 4}),
    ("llama", {"rank": "full"}),
    ("llama", {"rank": 3, "profile": "vllm", "targets": "attention,mlp"}),
    ("llama", {"rank": 4, "dora": True}),
    ("llama", {"rank": 4, "drop_rest": True}),
    ("llama", {"rank": 4, "multiple_of": 8}),
    ("llama", {"rank": "auto"}),
    ("gpt2", {"rank": 4}),
    ("gpt2", {"rank": 4, "dtype": "bfloat16"}),
    ("gpt2", {"rank": 4, "exclude": ["ln_1.bias"]}),
]
AT_MOST: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rank": "energy:0.99"}),
    ("llama", {"rank": "energy:0.99", "max_rank": 35}),
    ("llama", {"rank": "gavish-donoho", "min_rank": 2}),
    ("llama", {"rank": "budget:900"}),
    ("llama", {"rank": "budget:900", "dora": True}),
    ("llama", {"rank": "budget:3000", "profile": "sglang", "targets": "attention,mlp"}),
    ("gpt2", {"rank": 4, "bias": "lora_bias"}),
]


def pair(tmp_path: Path, like: str) -> tuple[Path, Path]:
    state = llama_like() if like == "llama" else gpt2_like(prefix="transformer.")
    config = LLAMA if like == "llama" else GPT2
    base = save_folder(state, tmp_path / "base", config)
    return base, save_folder(moved(state), tmp_path / "tuned", config)


@pytest.mark.parametrize(("like", "options"), EXACT + AT_MOST)
def test_the_size_at_most_holds(tmp_path: Path, like: str, options: dict[str, Any]) -> None:
    """And is the size itself where everything changed and ranks are known."""
    base, tuned = pair(tmp_path, like)
    foreseen = plan_extract(base, tuned, tmp_path / "a", **options).forecast
    report = lt.extract(base, tuned, tmp_path / "a", **options)
    assert report.adapter_bytes <= foreseen.bytes_at_most
    if (like, options) in EXACT:
        assert report.adapter_bytes == foreseen.bytes_at_most


def test_the_size_of_factors_of_convolutions_is_foreseen(tmp_path: Path) -> None:
    state = llama_like() | {"conv.weight": random_tensor(12, 6, 3, 3)}
    base, tuned = save_folder(state, tmp_path / "base"), save_folder(moved(state), tmp_path / "t")
    for dora in (False, True):
        options: dict[str, Any] = {"rank": 2, "conv_rank": 5, "dora": dora, "overwrite": True}
        foreseen = plan_extract(base, tuned, tmp_path / "a", **options).forecast
        report = lt.extract(base, tuned, tmp_path / "a", **options)
        assert report.adapter_bytes == foreseen.bytes_at_most


def test_what_the_profile_would_refuse_is_said_before_the_work(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "llama")
    ended = invoke("extract", base, tuned, "-o", tmp_path / "a", "--profile", "vllm", "--dry-run")
    assert ended.code == 0
    assert "vllm does not take" in ended.err
    assert "input_layernorm.weight: stored whole" in ended.err
    options = ("--profile", "vllm", "--drop-rest", "--targets", "attention", "--dry-run")
    ended = invoke("extract", base, tuned, "-o", tmp_path / "a", *options)
    assert "does not take" not in ended.err


def test_what_would_be_dropped_is_not_said_to_be_stored(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "llama")
    ended = invoke("extract", base, tuned, "-o", tmp_path / "a", "--drop-rest", "--dry-run")
    assert "dropped" in ended.out
    assert "whole" not in ended.out


def test_what_the_table_of_ranks_leaves_out_is_said(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "llama")
    table = ("extract", base, tuned, "-o", tmp_path / "a", "--dry-run=ranks")
    assert "not in the table" not in invoke(*table).out
    assert "--rank-for and --conv-rank are not in the table" in (
        invoke(*table, "--rank-for", "down_proj=2").out
    )
    assert "what --dora makes of these ranks is not in the table" in invoke(*table, "--dora").out


def test_a_folder_is_no_place_for_a_report(tmp_path: Path) -> None:
    """Said before the work, not after it."""
    base, tuned = pair(tmp_path, "llama")
    ended = invoke("extract", base, tuned, "-o", tmp_path / "a", "--report", tmp_path)
    assert ended.code == 2
    assert "is a folder; a report is a file" in ended.err
    assert not (tmp_path / "a").exists()


def test_the_last_rank_for_wins_where_a_pattern_is_given_twice(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "llama")
    given = [word for rank in ("mlp=2", "up_proj=3", "mlp=4") for word in ("--rank-for", rank)]
    ended = invoke("extract", base, tuned, "-o", tmp_path / "a", "--rank", "1", *given)
    assert ended.code == 0
    updates = lt.open_adapter(tmp_path / "a").low_rank
    assert {update.rank for name, update in updates.items() if ".mlp." in name} == {4}
