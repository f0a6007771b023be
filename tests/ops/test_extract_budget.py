"""A budget of parameters: what is written is what was counted, and of nothing nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, NoProgress
from loratool.errors import NothingMatches
from loratool.ops.extract_budget import shared_out
from loratool.ops.extract_plan import plan_extract
from loratool.ops.extract_tradeoff import rank_tradeoff
from loratool.profiles import find_profile
from tests.builders import random_tensor
from tests.ops.builders import LLAMA, MIXTURE, State, llama_like, mixture_like, moved, save_folder

PROJECTIONS = {"targets": "attention,mlp"}


def uneven(state: State) -> State:
    """Expert 0 changes most and expert 3 not at all."""
    tuned = moved(state)
    for name, value in state.items():
        if ".experts.0." in name:
            tuned[name] = value + 20 * (tuned[name] - value)
        if ".experts.3." in name:
            tuned[name] = value.clone()
    return tuned


def written(folder: Path) -> int:
    """Values of all factors in the file."""
    updates = lt.open_adapter(folder).low_rank.values()
    return sum(update.a.read().numel() + update.b.read().numel() for update in updates)


def test_the_experts_of_a_parameter_share_what_they_are_padded_to(tmp_path: Path) -> None:
    state = mixture_like()
    base = save_folder(state, tmp_path / "base", MIXTURE)
    tuned = save_folder(uneven(state), tmp_path / "tuned", MIXTURE)
    options: dict[str, Any] = {"targets": "experts"}
    report = lt.extract(base, tuned, tmp_path / "a", rank="budget:1500", **options)
    assert written(tmp_path / "a") == report.adapter_parameters <= 1500
    assert f"{report.adapter_parameters:,} are used" in " ".join(report.notes)
    plan = plan_extract(base, tuned, tmp_path / "b", rank="budget:1500", **options)
    tradeoff = rank_tradeoff(plan, max_rank=4, engine=Engine(), progress=NoProgress())
    for row in tradeoff.rows:
        lt.extract(base, tuned, tmp_path / f"r{row.rank}", rank=row.rank, **options)
        assert written(tmp_path / f"r{row.rank}") == row.parameters


@pytest.mark.parametrize("profile", ["vllm", "sglang", "llama.cpp"])
def test_a_consumer_of_one_rank_gets_the_largest_that_the_budget_pays_for(
    tmp_path: Path, profile: str
) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    options: dict[str, Any] = {"profile": profile, **PROJECTIONS}
    for budget in (500, 4000, 6000, 10**6):
        report = lt.extract(
            base, tuned, tmp_path / "a", rank=f"budget:{budget}", overwrite=True, **options
        )
        assert written(tmp_path / "a") == report.adapter_parameters <= budget
        assert f"{report.adapter_parameters:,} are used" in " ".join(report.notes)
    plan = plan_extract(base, tuned, tmp_path / "b", rank=4, **options)
    tradeoff = rank_tradeoff(plan, max_rank=None, engine=Engine(), progress=NoProgress())
    for row in tradeoff.rows:
        lt.extract(base, tuned, tmp_path / f"r{row.rank}", rank=row.rank, **options)
        assert written(tmp_path / f"r{row.rank}") == row.parameters
        assert row.budget_error <= row.error + 1e-12


def test_a_budget_for_a_consumer_ends_at_its_largest_rank() -> None:
    values = torch.linspace(1, 0.1, 600, dtype=torch.float64)
    spectra = {"w": Spectrum(values, float(values.square().sum()), (600, 600))}
    for parameters, rank in ((10**9, 512), (9 * 1200, 8)):
        ranks, allocation = shared_out(spectra, {}, parameters, find_profile("vllm"))
        assert ranks == {"w": rank}
        assert allocation.used == rank * 1200


def test_the_largest_rank_holds_for_every_kind_of_matrix(tmp_path: Path) -> None:
    state = llama_like() | {"conv.weight": random_tensor(12, 6, 3, 3)}
    base, tuned = save_folder(state, tmp_path / "base"), save_folder(moved(state), tmp_path / "t")
    report = lt.extract(
        base,
        tuned,
        tmp_path / "a",
        rank="budget:1000000",
        max_rank=2,
        conv_rank=8,
        rank_for={"up_proj": 8},
    )
    assert {row.rank for row in report.rows if row.rank} == {2}


def test_a_budget_for_no_component_is_refused(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    for profile in ("peft", "vllm"):
        with pytest.raises(NothingMatches, match="a budget of 20 parameters holds no component"):
            lt.extract(
                base, tuned, tmp_path / "a", rank="budget:20", profile=profile, **PROJECTIONS
            )
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_nothing_is_not_written(tmp_path: Path) -> None:
    """No program loads it."""
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    norm = {"model.norm.weight": state["model.norm.weight"] + 1}
    cases: list[tuple[State, dict[str, Any], str]] = [
        (moved(state), {"rank": "absolute:1e9", **PROJECTIONS}, "below the rank rule"),
        (state | norm, {"drop_rest": True}, "dropped"),
        (state | norm, {"targets": "q"}, "excluded"),
    ]
    for number, (tuned_state, options, reason) in enumerate(cases):
        tuned = save_folder(tuned_state, tmp_path / f"tuned{number}", LLAMA)
        with pytest.raises(NothingMatches, match="no change is left to store") as raised:
            lt.extract(base, tuned, tmp_path / "a", **options)
        assert reason in " ".join(raised.value.details)
        assert not (tmp_path / "a").exists()


def test_a_budget_says_what_it_may_have_missed(tmp_path: Path) -> None:
    """As a share of the change, whatever its size; and where no larger rank was looked at."""
    said = []
    for size in (1.0, 1e-3):
        base_state = {f"layers.{i}.fc.weight": torch.zeros(300 + i, 280) for i in range(2)}
        torch.manual_seed(0)
        tuned_state = {name: size * torch.randn(w.shape) for name, w in base_state.items()}
        base = save_folder(base_state, tmp_path / f"base{size}")
        tuned = save_folder(tuned_state, tmp_path / f"tuned{size}")
        report = lt.extract(base, tuned, tmp_path / f"a{size}", rank="budget:20000")
        assert [note for note in report.notes if "largest rank that a budget" in note] == []
        said += [note for note in report.notes if "to within" in note]
    assert said[0] == said[1]
    assert 0 < float(said[0].split("to within ")[1].split(" %")[0]) < 1.5, "one component of 560"
    for limit, rank in ((None, 256), (280, 280)):
        report = lt.extract(
            base, tuned, tmp_path / f"b{rank}", rank="budget:1000000", max_rank=limit
        )
        assert {row.rank for row in report.rows} == {rank}
        noted = [note for note in report.notes if "2 matrices have the largest rank" in note]
        assert len(noted) == (limit is None)
