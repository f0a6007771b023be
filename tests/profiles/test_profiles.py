"""Profiles change the form of an adapter, never its values, and say what is in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.errors import Unplaced, UsageError
from loratool.profiles import PROFILES
from tests.ops.builders import LLAMA, llama_like, load_folder, moved, save_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    return base, save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)


def extract(pair: tuple[Path, Path], out: Path, profile: str, rank: str = "energy:0.6") -> None:
    exclude = ["embed_tokens", "lm_head"]
    lt.extract(*pair, out, rank=rank, profile=profile, drop_rest=True, exclude=exclude)


@pytest.mark.parametrize("profile", ["vllm", "sglang", "llama.cpp"])
def test_uniform_rank_and_scale_and_the_same_merge(
    pair: tuple[Path, Path], tmp_path: Path, profile: str
) -> None:
    extract(pair, tmp_path / "plain", "peft")
    extract(pair, tmp_path / "fitted", profile)
    config = json.loads((tmp_path / "fitted" / "adapter_config.json").read_text())
    assert "rank_pattern" not in config
    assert "alpha_pattern" not in config
    assert "modules_to_save" not in config
    assert config["bias"] == "none"
    ranks = {update.rank for update in lt.open_adapter(tmp_path / "fitted").low_rank.values()}
    plain = {update.rank for update in lt.open_adapter(tmp_path / "plain").low_rank.values()}
    assert len(plain) > 1
    assert ranks == {config["r"]}
    allowed = PROFILES[profile].limits.ranks or range(1, 100)
    assert config["r"] == min(rank for rank in allowed if rank >= max(plain))
    for name in ("plain", "fitted"):
        lt.merge(pair[0], tmp_path / name, tmp_path / f"merged-{name}")
    one, two = load_folder(tmp_path / "merged-plain"), load_folder(tmp_path / "merged-fitted")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_added_rank_can_be_trained(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """B's added columns are zero and A's rows are not: the gradient of B is not dead."""
    extract(pair, tmp_path / "fitted", "vllm", rank="3")
    for update in lt.open_adapter(tmp_path / "fitted").low_rank.values():
        b, a = update.b.read(), update.a.read()
        assert b.shape[1] == a.shape[0] == 8
        assert bool((b[:, 3:] == 0).all())
        assert bool((a[3:].norm(dim=1) > 0.3).all())
        assert update.scale == 1.0


def test_what_is_in_the_way_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Unplaced, match="vllm does not take") as caught:
        lt.extract(*pair, tmp_path / "a", rank=4, profile="vllm")
    text = "\n".join(caught.value.details)
    assert "model.norm.weight: stored whole" in text
    assert "lm_head.weight: an update of lm_head" in text
    assert "embed_tokens.weight: an update of an embedding" in text
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="unknown profile 'ollama'"):
        lt.extract(*pair, tmp_path / "a", profile="ollama")


def test_ranks_beyond_the_largest_are_refused(tmp_path: Path) -> None:
    state = {"model.layers.0.mlp.up_proj.weight": torch.zeros(700, 600)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    with pytest.raises(Unplaced, match="ranks up to 512, this adapter has 530"):
        lt.extract(base, tuned, tmp_path / "a", rank=530, profile="vllm")


def test_peft_takes_everything() -> None:
    limits = PROFILES["peft"].limits
    assert limits.whole_modules
    assert limits.biases
    assert limits.embeddings
    assert not limits.one_rank
