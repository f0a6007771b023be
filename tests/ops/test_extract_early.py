"""Whole tensors that are stored while others are factorised: the same adapter, sooner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.ops import extract as extract_op
from loratool.ops import extract_early
from loratool.storage.early import EarlyFile
from tests.faults.killing import COUNT_ONLY, bytes_of, run
from tests.ops.builders import LLAMA, llama_like, load_folder, save_folder

WHOLE = {"embed_tokens": "whole", "lm_head": "whole"}
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each extraction found in place at its end."""
    found: list[set[str]] = []
    original = EarlyFile.finish

    def finish(self: EarlyFile, *rest: Any) -> set[str]:
        found.append(original(self, *rest))
        return found[-1]

    monkeypatch.setattr(EarlyFile, "finish", finish)
    return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to store."""
    monkeypatch.setattr(extract_early, "LEAST_BYTES", 0)


def pair(
    tmp_path: Path, unchanged: str = "nothing", more: Mapping[str, torch.Tensor] | None = None
) -> tuple[Path, Path]:
    state = llama_like(torch.bfloat16) | dict(more or {})
    generator = torch.Generator().manual_seed(9)
    changed = {
        name: w
        if unchanged in name
        else (w.float() + 0.02 * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in state.items()
    }
    base = save_folder(state, tmp_path / "base", LLAMA)
    return base, save_folder(changed, tmp_path / "tuned", LLAMA)


def both_ways(
    sides: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    lt.extract(*sides, tmp_path / "early", **options)
    monkeypatch.setattr(extract_early, "LEAST_BYTES", 2**60)
    lt.extract(*sides, tmp_path / "ordinary", **options)
    assert bytes_of(tmp_path / "early") == bytes_of(tmp_path / "ordinary")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"rank": 4}, id="fixed"),
        pytest.param({"rank": "full"}, id="full"),
        pytest.param({"rank": 4, "profile": "peft", "dora": True}, id="dora"),
        pytest.param({"rank": 20}, id="more than some have"),
        pytest.param({"rank": "budget:5000"}, id="budget"),
    ],
)
def test_the_same_adapter(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    both_ways(pair(tmp_path), tmp_path, monkeypatch, rank_for=WHOLE, **options)
    assert len(placed) == 1, "the second is written in the ordinary way"
    assert {HEAD, "base_model.model.model.embed_tokens.weight"} <= placed[0]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("unchanged", ["embed_tokens", "layers.0.input_layer", "norm"])
def test_what_whole_tensors_did_not_change_is_known_in_time(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchanged: str
) -> None:
    """Norms mostly stay as they are where training was in bf16."""
    both_ways(pair(tmp_path, unchanged), tmp_path, monkeypatch, rank=4, rank_for=WHOLE)
    assert HEAD in placed[0]


@pytest.mark.usefixtures("at_once")
def test_a_matrix_that_did_not_change_was_guessed_wrong(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker: with two, it may be known before the last of the whole tensors is."""
    options = {"rank": 4, "rank_for": WHOLE, "jobs": 1}
    both_ways(pair(tmp_path, "layers.1.mlp.up"), tmp_path, monkeypatch, **options)
    assert placed == [set()]


@pytest.mark.usefixtures("at_once")
def test_what_is_left_out_matters_to_no_guess(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rank": 4, "rank_for": WHOLE, "exclude": ["mlp"]}
    both_ways(pair(tmp_path), tmp_path, monkeypatch, **options)
    assert HEAD in placed[0]


@pytest.mark.usefixtures("at_once")
def test_a_matrix_without_values_is_foreseen_as_unchanged(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = {"extra.weight": torch.empty(0, 24, dtype=torch.bfloat16)}
    both_ways(pair(tmp_path, more=empty), tmp_path, monkeypatch, rank=4, rank_for=WHOLE)
    assert HEAD in placed[0]


@pytest.mark.usefixtures("at_once")
def test_torch_files_with_views(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that share one storage, and one that is no range of it."""
    base, tuned = pair(tmp_path)
    state = load_folder(tuned)
    storage = torch.randn(80, 24).bfloat16()
    state["model.embed_tokens.weight"], state["lm_head.weight"] = storage[:50], storage[30:]
    state["model.norm.weight"] = storage[:24, 1]
    (tuned / "model.safetensors").unlink()
    torch.save(state, tuned / "pytorch_model.bin")
    both_ways((base, tuned), tmp_path, monkeypatch, rank=4, rank_for=WHOLE)
    prefix = "base_model.model.model."
    assert {HEAD, f"{prefix}embed_tokens.weight"} <= placed[0]
    assert f"{prefix}norm.weight" not in placed[0]
    stored = load_file(tmp_path / "early" / "adapter_model.safetensors")
    assert torch.equal(stored[HEAD], storage[30:])
    assert torch.equal(stored[f"{prefix}norm.weight"], storage[:24, 1])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("options", [{"rank": "energy:0.5"}, {"rank": 4, "drop_rest": True}])
def test_where_nothing_is_foreseen(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    both_ways(pair(tmp_path), tmp_path, monkeypatch, rank_for=WHOLE, **options)
    assert not any(placed)


def test_little_is_not_worth_it(placed: list[set[str]], tmp_path: Path) -> None:
    lt.extract(*pair(tmp_path), tmp_path / "out", rank=4, rank_for=WHOLE)
    assert placed == []


@pytest.mark.usefixtures("at_once")
def test_an_interrupted_run_goes_on(
    placed: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole tensors come first and are begun; the run ends; the next begins them again."""
    sides = pair(tmp_path)
    done = []
    original = extract_op.extract_tensor

    def interrupted(job: extract_op.ExtractJob, *rest: Any) -> extract_op.ExtractResult:
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(job.pair.name)
        return original(job, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(extract_op, "extract_tensor", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lt.extract(*sides, tmp_path / "early", rank=4, rank_for=WHOLE, jobs=1)
    assert placed == []
    (kept,) = tmp_path.glob(".early.*")
    assert list((kept / "scratch").iterdir())
    assert not list((kept / "out").iterdir()), "half a file is of no use to the next run"
    both_ways(sides, tmp_path, monkeypatch, rank=4, rank_for=WHOLE)
    assert len(placed[0]) >= 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "early", "ordinary", "tuned"]


@pytest.mark.usefixtures("at_once")
def test_killed_at_any_step(tmp_path: Path) -> None:
    """Nothing is there, or all of it; and the same command then works."""
    sides = pair(tmp_path)
    lt.extract(*sides, tmp_path / "whole", rank=4, rank_for=WHOLE)
    out = tmp_path / "out"
    command = ["extract", *sides, "-o", out, "--rank", 4, "--jobs", 1]
    command += [word for name in WHOLE for word in ("--rank-for", f"{name}=whole")]
    code, steps = run(command, COUNT_ONLY)
    assert code == 0
    inputs = [bytes_of(side) for side in sides]
    for step in range(1, steps + 1, 5):
        if out.exists():
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        run(command, die_at=step)
        if out.exists():
            assert bytes_of(out) == bytes_of(tmp_path / "whole")
            continue
        code, _ = run(command)
        assert code == 0
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "tuned", "whole"]
    assert inputs == [bytes_of(side) for side in sides]
