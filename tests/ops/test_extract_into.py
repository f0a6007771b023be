"""Extraction that continues from an adapter: its factors stay, the rest is extracted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.errors import (
    DisagreementError,
    NothingMatches,
    OutputError,
    ShapeMismatch,
    Unplaced,
    UsageError,
)
from loratool.ops.extract_plan import plan_extract
from loratool.ops.extract_resume import resume_key
from loratool.report.text import percent
from tests.ops.builders import (
    LLAMA,
    State,
    llama_like,
    load_folder,
    moved,
    save_folder,
    save_peft,
)

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


def matrices() -> State:
    return {name: value for name, value in llama_like().items() if value.ndim == 2}


def factors(*modules: str, rank: int = 2) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    state = matrices()
    found = {}
    for module in modules:
        out, into = state[f"{module}.weight"].shape
        a = torch.randn(rank, into, generator=generator)
        found[module] = (a, torch.randn(out, rank, generator=generator) * 0.02)
    return found


def updated(state: State, old: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> State:
    """``state`` with the updates of an adapter in it."""
    state = dict(state)
    for module, (a, b) in old.items():
        state[f"{module}.weight"] = state[f"{module}.weight"] + scale * b @ a
    return state


@pytest.mark.parametrize("alpha", [4, -3, 0.7])
def test_old_factors_stay_and_the_rest_is_added(tmp_path: Path, alpha: float) -> None:
    state, old = matrices(), factors(UP, DOWN)
    adapter = save_peft(tmp_path / "old", old, lora_alpha=alpha)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned_state = updated(moved(state, rank=3), old, alpha / 2)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "new", rank=3, into=adapter)
    rows = {row.name: row for row in report.rows}
    updates = lt.open_adapter(tmp_path / "new").low_rank
    assert [u.scale for u in updates.values()] == pytest.approx([alpha / 2] * len(updates), 1e-15)
    for name, update in updates.items():
        row, module = rows[name], name.removesuffix(".weight")
        assert (row.rank, row.kept_rank) == ((5, 2) if module in old else (3, None))
        assert update.rank == row.rank
        assert (row.relative_error or 0.0) < 1e-5
        if module in old:
            assert torch.equal(update.a.read()[:2], old[module][0])
            assert torch.equal(update.b.read()[:, :2], old[module][1])
    lt.merge(base, tmp_path / "new", tmp_path / "merged")
    for name, value in load_folder(tmp_path / "merged").items():
        torch.testing.assert_close(value, tuned_state[name], rtol=1e-4, atol=1e-5)


def test_errors_and_rests_are_the_true_ones(tmp_path: Path) -> None:
    state, old = llama_like(torch.bfloat16), factors(UP)
    adapter = save_peft(tmp_path / "old", old, lora_alpha=4)
    tuned_state = {n: v.bfloat16() for n, v in updated(moved(state, size=0.05), old, 2.0).items()}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "new", rank=4, into=adapter)
    row = next(row for row in report.rows if row.name == f"{UP}.weight")
    delta = tuned_state[row.name].double() - state[row.name].double()
    rest = delta - 2 * old[UP][1].double() @ old[UP][0].double()
    assert row.rest_norm == pytest.approx(rest.norm().item(), rel=1e-6)
    assert list(row.singular_values) == pytest.approx(
        torch.linalg.svdvals(rest)[:4].tolist(), rel=1e-5
    )
    stored = lt.open_adapter(tmp_path / "new").low_rank[row.name].load().dense()
    missed = (delta - stored).norm() / delta.norm()
    assert row.relative_error == pytest.approx(missed.item(), rel=1e-6)
    explained = 1 - (rest.norm() / delta.norm()) ** 2
    assert any(f"alone explains {percent(explained)} of" in note for note in report.notes)
    assert report.to_json()["tensors"][0].keys() >= {"kept_rank", "rest_norm"}


def test_what_the_adapter_explains_is_not_extracted_again(tmp_path: Path) -> None:
    state, old = matrices(), factors(UP, DOWN)
    adapter = save_peft(tmp_path / "old", old, lora_alpha=4)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned_state = updated(state, old, 2.0)
    tuned_state["lm_head.weight"] = moved(state)["lm_head.weight"]
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "new", rank="absolute:0.001", into=adapter)
    ranks = {row.name: row.rank for row in report.rows if row.kept_rank}
    assert ranks == {f"{UP}.weight": 2, f"{DOWN}.weight": 2}
    spent = lt.extract(base, tuned, tmp_path / "spent", rank="budget:500", into=adapter)
    assert {row.rank for row in spent.rows if row.kept_rank} == {2}


def test_adapters_that_do_not_fit_the_change_are_said_to(tmp_path: Path) -> None:
    state, old = matrices(), factors(UP, DOWN)
    adapter = save_peft(tmp_path / "old", old, lora_alpha=4)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned_state = moved(state, size=1e-4)
    tuned_state[f"{DOWN}.weight"] = state[f"{DOWN}.weight"]
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "new", rank=4, into=adapter)
    notes = "\n".join(report.notes)
    assert "explains nothing of the change" in notes
    assert f"left out, for no change of their tensors: 1 update of --into ({DOWN}" in notes
    assert f"{DOWN}.weight" not in lt.open_adapter(tmp_path / "new").updates


def test_refusals(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    adapter = save_peft(tmp_path / "old", factors(UP), lora_alpha=4)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="1 update of the adapter would be lost") as caught:
        lt.extract(base, tuned, out, into=adapter, targets="attention", rank=2)
    assert caught.value.details == (f"{UP}.weight",)
    with pytest.raises(UsageError, match="--rank full stores the whole change"):
        lt.extract(base, tuned, out, into=adapter, rank="full")
    with pytest.raises(UsageError, match="--alpha is for the adapter of --into"):
        lt.extract(base, tuned, out, alpha=3, rank=2)
    with pytest.raises(OutputError):
        lt.extract(base, tuned, adapter, into=adapter, rank=2, overwrite=True)
    other = save_peft(tmp_path / "other", {"model.layers.7.mlp.up_proj": factors(UP)[UP]})
    with pytest.raises(NothingMatches, match=r"match(es)? no tensor of the base"):
        lt.extract(base, tuned, out, into=other, rank=2)
    wide = save_peft(tmp_path / "wide", {UP: (torch.ones(2, 25), torch.ones(40, 2))})
    with pytest.raises(ShapeMismatch):
        lt.extract(base, tuned, out, into=wide, rank=2)
    zero = save_peft(tmp_path / "zero", factors(UP), lora_alpha=0)
    with pytest.raises(DisagreementError, match="scale 0"):
        lt.extract(base, tuned, out, into=zero, rank=2)
    mixed = save_peft(tmp_path / "mixed", factors(UP, DOWN), alpha_pattern={DOWN: 9})
    with pytest.raises(Unplaced) as caught_scale:
        lt.extract(
            base,
            tuned,
            out,
            into=mixed,
            rank=2,
            profile="vllm",
            drop_rest=True,
            exclude=["lm_head", "embed_tokens"],
        )
    assert f"{DOWN}.weight: scale 4.5 where others have 2" in caught_scale.value.details
    assert not out.exists()


def test_another_adapter_does_not_take_over_finished_tensors(tmp_path: Path) -> None:
    base = save_folder(matrices(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(matrices()), tmp_path / "tuned", LLAMA)
    adapter = save_peft(tmp_path / "old", factors(UP), lora_alpha=4)
    plans = [
        plan_extract(base, tuned, tmp_path / "a", rank=2, into=into, sketch_dtype=sketch)
        for into, sketch in ((adapter, "auto"), (None, "auto"), (None, "float32"))
    ]
    assert len({resume_key(plan.jobs, plan.into) for plan in plans}) == 3
    old = plans[0]
    weights = adapter / "adapter_model.safetensors"
    before = resume_key(old.jobs, old.into)
    os.utime(weights, ns=(1, 1))
    assert resume_key(old.jobs, old.into) != before


def test_updates_of_matrices_that_are_taken_apart_are_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    name = "model.layers.0.self_attn.qkv_proj"
    state = {f"{name}.weight": torch.randn(32, 16), "model.norm.weight": torch.ones(16)}
    base = save_folder(state, tmp_path / "base", config)
    tuned = save_folder(moved(state), tmp_path / "tuned", config)
    lt.extract(base, tuned, tmp_path / "first", rank=2, drop_rest=True)
    with pytest.raises(UsageError, match="1 update of what is extracted in parts"):
        plan_extract(
            base,
            tuned,
            tmp_path / "a",
            rank=2,
            into=tmp_path / "first",
            split_fused=True,
            profile="vllm",
        )


def test_updates_of_parts_of_a_fused_matrix_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    attention = "model.layers.0.self_attn"
    state = {f"{attention}.qkv_proj.weight": torch.randn(32, 16)}
    base = save_folder(state, tmp_path / "base", config)
    tuned = save_folder(moved(state), tmp_path / "tuned", config)
    q = {f"{attention}.q_proj": (torch.randn(2, 16), torch.randn(16, 2))}
    save_peft(tmp_path / "first", q)
    with pytest.raises(UsageError, match="1 update is of parts of a matrix"):
        plan_extract(base, tuned, tmp_path / "a", rank=2, into=tmp_path / "first")


def test_updates_of_experts_are_refused_with_the_reason(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    owner = "model.layers.0.mlp.experts"
    state = {
        f"{owner}.gate_up_proj": torch.randn(2, 12, 8),
        f"{owner}.down_proj": torch.randn(2, 8, 6),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    base = save_folder(state, tmp_path / "base", config)
    tuned = save_folder(moved(state), tmp_path / "tuned", config)
    lt.extract(base, tuned, tmp_path / "first", rank=2)
    with pytest.raises(UsageError, match="updates are of experts"):
        plan_extract(base, tuned, tmp_path / "a", rank=2, into=tmp_path / "first")


@pytest.mark.parametrize(
    ("adapters", "tuned_as", "asked", "stored"),
    [
        (torch.float32, torch.bfloat16, None, torch.float32),
        (torch.float16, torch.bfloat16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, None, torch.float32),
        (torch.float32, torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_old_factors_stay_in_a_dtype_that_holds_them(
    tmp_path: Path,
    adapters: torch.dtype,
    tuned_as: torch.dtype,
    asked: str | None,
    stored: torch.dtype,
) -> None:
    old = {m: (a.to(adapters), b.to(adapters)) for m, (a, b) in factors(UP, DOWN).items()}
    adapter = save_peft(tmp_path / "old", old)
    base = save_folder(matrices(), tmp_path / "base", LLAMA)
    tuned_state = {name: value.to(tuned_as) for name, value in moved(matrices()).items()}
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "new", rank=3, into=adapter, dtype=asked)
    update = lt.open_adapter(tmp_path / "new").low_rank[f"{UP}.weight"]
    assert update.a.read().dtype == stored
    rounded = any("the factors of --into" in note for note in report.notes)
    assert rounded == (asked is not None)
    assert torch.equal(update.a.read()[:2].float(), old[UP][0].float()) != rounded
