"""Other forms of the result: bias differences and DoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.adapter import DenseUpdate, DoraUpdate
from loratool.errors import Unplaced, UsageError
from loratool.ops.extract_jobs import extract_tensor
from loratool.ops.extract_plan import plan_extract
from loratool.ops.extract_report import Status
from loratool.ops.extract_resume import keep, recall
from tests.ops.builders import (
    GPT2,
    LLAMA,
    MIXTURE,
    gpt2_like,
    llama_like,
    load_folder,
    mixture_like,
    moved,
    save_folder,
    save_peft,
)

Pair = tuple[Path, Path]
C_ATTN = "transformer.h.0.attn.c_attn"


@pytest.fixture
def gpt2_pair(tmp_path: Path) -> Pair:
    state = gpt2_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", GPT2)
    return base, save_folder(moved(state), tmp_path / "tuned", GPT2)


# Biases ---------------------------------------------------------------------------------------


def test_biases_beside_factors(gpt2_pair: Pair, tmp_path: Path) -> None:
    base, tuned = gpt2_pair
    report = lt.extract(base, tuned, tmp_path / "a", rank=2, bias="lora_bias")
    updates = lt.open_adapter(tmp_path / "a").updates
    before, after = load_folder(base), load_folder(tuned)
    rows = {row.name: row for row in report.rows}
    differences = [name for name, update in updates.items() if isinstance(update, DenseUpdate)]
    assert len(differences) == 6
    for name in differences:
        update, stored_name = updates[name], name.removeprefix("transformer.")
        assert isinstance(update, DenseUpdate)
        delta = after[stored_name].double() - before[stored_name].double()
        missed = delta - update.value.read().double()
        assert rows[name].status == "stored as a difference"
        relative = (missed.norm() / delta.norm()).item()
        assert rows[name].relative_error == pytest.approx(relative, rel=1e-9, abs=1e-12)
        assert relative < 2**-8
    assert rows["transformer.ln_f.bias"].status == "stored whole"
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    for name in after:
        if name.endswith(".bias"):
            torch.testing.assert_close(merged[name], after[name], rtol=2**-8, atol=1e-4)


def test_a_bias_whose_matrix_has_no_factors_is_stored_whole(tmp_path: Path) -> None:
    state = gpt2_like()
    tuned_state = moved(state)
    tuned_state["h.0.attn.c_attn.weight"] = state["h.0.attn.c_attn.weight"]
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(tuned_state, tmp_path / "tuned", GPT2)
    report = lt.extract(base, tuned, tmp_path / "a", rank=2, bias="lora_bias")
    rows = {row.name: row for row in report.rows}
    assert rows[f"{C_ATTN}.bias"].status == "stored whole"
    assert rows[f"{C_ATTN}.bias"].relative_error == 0.0
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")["h.0.attn.c_attn.bias"]
    assert torch.equal(merged, tuned_state["h.0.attn.c_attn.bias"])


def test_differences_have_the_scale_of_the_factors(tmp_path: Path) -> None:
    state = gpt2_like()
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(moved(state), tmp_path / "tuned", GPT2)
    old = save_peft(
        tmp_path / "old",
        {
            f"transformer.h.{i}.attn.c_attn": (torch.randn(2, 16), torch.randn(48, 2) * 1e-3)
            for i in range(2)
        },
        lora_alpha=0.7,
        alpha_pattern={"h.1.attn.c_attn": 9},
        fan_in_fan_out=True,
    )
    lt.extract(base, tuned, tmp_path / "a", rank=3, bias="lora_bias", into=old)
    updates = lt.open_adapter(tmp_path / "a").updates
    for i, scale in enumerate((0.35, 4.5)):
        bias = updates[f"transformer.h.{i}.attn.c_attn.bias"]
        assert isinstance(bias, DenseUpdate)
        assert bias.scale == pytest.approx(scale)
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged, after = load_folder(tmp_path / "merged"), load_folder(tuned)
    for i in range(2):
        name = f"h.{i}.attn.c_attn.bias"
        torch.testing.assert_close(merged[name], after[name], rtol=1e-6, atol=1e-8)


def test_modules_without_a_bias_are_named(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    with pytest.raises(UsageError, match="have no bias of their own") as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=2, bias="lora_bias")
    assert "model.layers.0.self_attn.q_proj.weight" in caught.value.details
    with pytest.raises(UsageError, match="unknown form of biases"):
        lt.extract(base, tuned, tmp_path / "a", rank=2, bias="none")
    state = {**llama_like(), "lm_head.bias": torch.zeros(50)}
    base = save_folder(state, tmp_path / "base2", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned2", LLAMA)
    report = lt.extract(
        base, tuned, tmp_path / "b", rank=2, bias="lora_bias", targets="lm_head,embed_tokens"
    )
    assert any("model.embed_tokens.weight: stored whole" in note for note in report.notes)
    status = {row.name: str(row.status) for row in report.rows}
    assert status["model.embed_tokens.weight"] == "stored whole"
    assert status["lm_head.bias"] == "stored as a difference"


# DoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stated_errors_are_those_of_the_merged_weights(tmp_path: Path, dtype: str) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned_state = moved(state, size=0.05)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    options = {"rank": 4, "targets": "all-linear", "drop_rest": True}
    report = lt.extract(base, tuned, tmp_path / "a", dora=True, dtype=dtype, **options)  # type: ignore[arg-type]
    plain = lt.extract(base, tuned, tmp_path / "b", dtype=dtype, **options)  # type: ignore[arg-type]
    updates = lt.open_adapter(tmp_path / "a").updates
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    for row, other in zip(report.rows, plain.rows, strict=True):
        if row.rank is None:
            continue
        update = updates[row.name]
        assert isinstance(update, DoraUpdate)
        w0, w = state[row.name].double(), tuned_state[row.name].double()
        v = w0 + update.low_rank.load().dense()
        exact = update.magnitude.read().double()[:, None] * v / v.norm(dim=1, keepdim=True)
        missed = (w - exact).norm() / (w - w0).norm()
        assert row.relative_error == pytest.approx(missed.item(), rel=1e-6)
        assert (row.relative_error or 1) < (other.relative_error or 0)
        assert row.excess_bound is None
        assert (row.method or "").startswith("DoRA")
        torch.testing.assert_close(merged[row.name].double(), exact, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(exact.norm(dim=1), w.norm(dim=1), rtol=1e-6, atol=0)


def test_dora_at_full_rank_is_exact_up_to_rounding(gpt2_pair: Pair, tmp_path: Path) -> None:
    base, tuned = gpt2_pair
    report = lt.extract(base, tuned, tmp_path / "a", rank="full", dora=True, dtype="float32")
    assert all((row.relative_error or 0) < 1e-5 for row in report.rows)
    lt.merge(base, tmp_path / "a", tmp_path / "merged")
    merged, after = load_folder(tmp_path / "merged"), load_folder(tuned)
    for name, value in after.items():
        assert (merged[name] == value).float().mean() > 0.99, name


def test_dora_refusals(gpt2_pair: Pair, tmp_path: Path) -> None:
    base, tuned = gpt2_pair
    out = tmp_path / "a"
    with pytest.raises(UsageError, match="does not go with --bias lora_bias"):
        lt.extract(base, tuned, out, rank=2, dora=True, bias="lora_bias")
    with pytest.raises(UsageError, match="does not go with --into"):
        lt.extract(base, tuned, out, rank=2, dora=True, into=base)
    with pytest.raises(Unplaced, match="vllm does not take") as caught:
        lt.extract(base, tuned, out, rank=2, dora=True, profile="vllm", drop_rest=True)
    assert any("DoRA of rank 2" in detail for detail in caught.value.details)
    name = "model.layers.0.mlp.up_proj.weight"
    state = llama_like()
    state[name][3] = 0
    tuned_state = moved(state)
    tuned_state[name][3] = 0
    base = save_folder(state, tmp_path / "base2", LLAMA)
    tuned = save_folder(tuned_state, tmp_path / "tuned2", LLAMA)
    with pytest.raises(Unplaced, match=f"{name}: output 3 is zero"):
        lt.extract(base, tuned, out, rank="full", dora=True)
    assert not out.exists()
    assert lt.extract(base, tuned, out, rank="full", dora=True, rank_for={name: "whole"})


# Both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{"dora": True}, {"bias": "lora_bias"}])
def test_finished_tensors_of_every_form_are_recalled(
    gpt2_pair: Pair, tmp_path: Path, form: dict[str, object]
) -> None:
    plan = plan_extract(*gpt2_pair, tmp_path / "a", rank=2, **form)  # type: ignore[arg-type]
    kinds = set()
    for job in plan.jobs:
        job = replace(job, scratch=tmp_path)
        result = extract_tensor(job)
        keep(job, result)
        assert recall(job) == result
        kinds.add(type(result.update))
    assert kinds & {DoraUpdate, DenseUpdate}


def test_single_experts_are_not_stored_whole(tmp_path: Path) -> None:
    """PEFT finds no module of an expert's name; full rank keeps all of its change."""
    state = mixture_like()
    base = save_folder(state, tmp_path / "base", MIXTURE)
    tuned = save_folder(moved(state), tmp_path / "tuned", MIXTURE)
    with pytest.raises(UsageError, match="4 experts cannot be stored whole") as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=2, rank_for={"down_proj": "whole"})
    assert "down_proj.0" in caught.value.details[0]
    report = lt.extract(base, tuned, tmp_path / "a", rank=2, rank_for={"down_proj": "full"})
    assert {row.rank for row in report.rows if "down_proj" in row.name} == {16}


def test_what_a_weight_is_computed_from_has_no_place(tmp_path: Path) -> None:
    """wav2vec2's weight norm: PEFT wraps no such module, so a file that has it does not load."""
    conv = "encoder.pos_conv_embed.conv"
    state = llama_like() | {
        f"{conv}.bias": torch.zeros(8),
        f"{conv}.parametrizations.weight.original0": torch.ones(1, 1, 4),
        f"{conv}.parametrizations.weight.original1": torch.ones(8, 4, 4),
    }
    base = save_folder(state, tmp_path / "base")
    tuned = save_folder(moved(state), tmp_path / "tuned")
    with pytest.raises(Unplaced, match="2 changed tensors have no place"):
        lt.extract(base, tuned, tmp_path / "a", rank=2)
    report = lt.extract(base, tuned, tmp_path / "a", rank=2, exclude=["parametrizations"])
    assert report.count(Status.EXCLUDED) == 2
