"""verify: right merges pass, and what is wrong with others is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.errors import DisagreementError, NonFiniteValues, NothingMatches, UsageError
from loratool.ops.verify import SAMPLED_ROWS, sample_rows
from loratool.ops.verify_claim import AS_STATED, UNSTATED, ClaimStatus
from loratool.ops.verify_report import DIFFERS, EXACT, ROUNDED, VerifyReport, excluded_share
from loratool.ops.verify_row import Cause, Order, Status
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
from tests.ops.test_merge import DOWN1, Q0, factors

SCALE = 2.0
Q, DOWN = f"{Q0}.weight", f"{DOWN1}.weight"
FACTORS = {Q0: factors(24, 24), DOWN1: factors(24, 40)}
Merge = Callable[[str, Tensor, Tensor], Tensor]
"""Tensor name, base weight, exact update (float64) → merged weight."""


def report_of(folder: Path, merge: Merge, dtype: torch.dtype = torch.bfloat16) -> VerifyReport:
    """verify's answer about a checkpoint that ``merge`` made."""
    state = llama_like(dtype)
    merged = dict(state)
    for module, (a, b) in FACTORS.items():
        name = f"{module}.weight"
        merged[name] = merge(name, state[name], SCALE * (b.double() @ a.double())).to(dtype)
    base = save_folder(state, folder / "base", LLAMA)
    adapter = save_peft(folder / "adapter", FACTORS, lora_alpha=6)
    return lt.verify(save_folder(merged, folder / "merged", LLAMA), base, adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_merge_writes_is_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_folder(llama_like(dtype), tmp_path / "base", LLAMA, shards=2)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "merged")
    report = lt.verify(tmp_path / "merged", base, adapter)
    assert report.verdict == EXACT
    assert {row.name for row in report.updated} == {Q, DOWN}
    assert all(row.status is Status.EQUAL and row.checked == row.elements for row in report.rows)
    assert len(report.rows) == len(llama_like())


def test_one_wrong_bit_is_found_and_placed(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    state[DOWN].view(torch.int16)[5, 7] ^= 1
    state["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(state, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    report = lt.verify(tmp_path / "merged", base, adapter)
    rows = {row.name: row for row in report.rows}
    assert (rows[DOWN].different, rows[DOWN].worst_at) == (1, (5, 7))
    assert rows[DOWN].status is Status.ROUNDING, "a unit in the last place"
    assert rows["model.norm.weight"].status is Status.CHANGED
    assert rows["model.norm.weight"].worst_at == (3,)
    assert report.verdict == DIFFERS
    assert "model.norm.weight" in report.diagnosis[-1]


def one_value_off(y: Tensor) -> Tensor:
    """By a twentieth of itself, twelve units in bf16's last place."""
    y = y.clone()
    y.view(-1)[int(y.abs().argmax())] *= 1.05
    return y


def float32_sum(name: str, w: Tensor, u: Tensor) -> Tensor:
    return w.float() + u.float()


def delta_first(name: str, w: Tensor, u: Tensor) -> Tensor:
    return w + u.to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peft_orders_are_within_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    report = report_of(tmp_path, delta_first, dtype)
    assert report.verdict == ROUNDED
    assert not report.differs
    assert {row.order for row in report.updated} == {Order.DELTA}
    assert all(row.different > 0.1 * row.elements for row in report.updated)
    assert "delta cast first" in report.diagnosis[0]


def test_a_sum_in_float32_is_within_rounding(tmp_path: Path) -> None:
    report = report_of(tmp_path, float32_sum)
    assert report.verdict in (EXACT, ROUNDED)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 3.0])
def test_a_wrong_scale_is_estimated(factor: float, tmp_path: Path) -> None:
    report = report_of(tmp_path, lambda name, w, u: w.double() + factor * u)
    assert {row.cause for row in report.updated} == {Cause.SCALE}
    assert report.fit == pytest.approx(factor, rel=2e-3)
    assert report.diagnosis[0].startswith("all updated tensors: wrong scale;")


@pytest.mark.parametrize(
    ("merge", "cause"),
    [
        (lambda name, w, u: w, Cause.NOT_APPLIED),
        (lambda name, w, u: w.double() - u, Cause.SUBTRACTED),
        (lambda name, w, u: w.double() + 2 * u, Cause.TWICE),
        (lambda name, w, u: w.double() + u + 0.01 * torch.randn_like(u), Cause.OTHER),
        (lambda name, w, u: one_value_off(w.double() + u), Cause.VALUES),
    ],
    ids=["not applied", "subtracted", "twice", "something else", "one value"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_broken_merge_is_diagnosed(
    merge: Merge, cause: Cause, dtype: torch.dtype, tmp_path: Path
) -> None:
    report = report_of(tmp_path, merge, dtype)
    assert report.verdict == DIFFERS
    assert {row.cause for row in report.updated} == {cause}
    assert {row.status for row in report.rows if not row.update} == {Status.EQUAL}


def test_a_transposed_and_a_missing_module(tmp_path: Path) -> None:
    def merge(name: str, w: Tensor, u: Tensor) -> Tensor:
        return w.double() + u.T if name == Q else w

    report = report_of(tmp_path, merge)
    causes = {row.name: row.cause for row in report.updated}
    assert causes == {Q: Cause.TRANSPOSED, DOWN: Cause.NOT_APPLIED}
    assert "1 of 2 updated tensors: the update is not in" in report.diagnosis


def test_an_update_below_the_rounding_that_is_not_in(tmp_path: Path) -> None:
    """Every weight is within a unit in the last place of what it should be, and still nothing was
    merged."""
    state = {Q: torch.ones(64, 64, dtype=torch.bfloat16)}
    a, b = torch.full((1, 64), 0.0026), torch.ones(64, 1)
    a[:, ::2] = 0.006
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b)}, lora_alpha=1)
    report = lt.verify(base, save_folder(state, tmp_path / "again", LLAMA), adapter)
    assert report.rows[0].cause is Cause.NOT_APPLIED


def test_missing_extra_and_reshaped_tensors(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    del merged[Q]
    merged["odd"] = torch.zeros(2)
    merged["lm_head.weight"] = merged["lm_head.weight"][:40].contiguous()
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    report = lt.verify(tmp_path / "merged", base, adapter)
    found = {row.name: row.status for row in report.rows if row.status is not Status.EQUAL}
    assert found == {
        Q: Status.MISSING,
        "odd": Status.EXTRA,
        "lm_head.weight": Status.SHAPE,
    }
    assert len(report.diagnosis) == 3


def test_conv1d_and_replaced_parameters(tmp_path: Path) -> None:
    """An extracted adapter at full rank, merged by hand."""
    state = gpt2_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(moved(state, rank=2), tmp_path / "tuned", GPT2)
    lt.extract(base, tuned, tmp_path / "adapter", rank=2)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert lt.verify(tmp_path / "merged", base, tmp_path / "adapter").verdict == EXACT
    report = lt.verify(base, save_folder(state, tmp_path / "same", GPT2), tmp_path / "adapter")
    replaced = [row for row in report.updated if row.update == "replaced"]
    assert replaced
    assert {row.cause for row in report.updated} == {Cause.NOT_APPLIED}


# Samples --------------------------------------------------------------------------------------


def test_a_sample_finds_what_is_wrong_everywhere(tmp_path: Path) -> None:
    weights = {Q: torch.randn(300, 300).bfloat16(), "other.weight": torch.randn(300, 4)}
    base = save_folder(weights, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(300, 300)}, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "merged")
    report = lt.verify(tmp_path / "merged", base, adapter, fast=True)
    assert report.verdict == EXACT
    checked = {row.name: row.checked for row in report.rows}
    assert checked == {Q: SAMPLED_ROWS * 300, "other.weight": SAMPLED_ROWS * 4}
    assert report.facts["seed"] == 0
    report = lt.verify(base, base, adapter, fast=True)
    assert report.updated[0].cause is Cause.NOT_APPLIED


def test_samples_depend_on_seed_and_name_alone() -> None:
    assert sample_rows(1000, "0:a") == sample_rows(1000, "0:a") != sample_rows(1000, "1:a")
    assert sample_rows(SAMPLED_ROWS, "0:a") is None
    chosen = sample_rows(65, "0:b")
    assert chosen is not None
    assert len(set(chosen)) == SAMPLED_ROWS
    assert max(chosen) < 65


def test_what_a_sample_excludes() -> None:
    share = excluded_share(64)
    assert (1 - share) ** 64 == pytest.approx(0.01)
    assert 0.06 < share < 0.08


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS)
    with pytest.raises(UsageError, match="without --base"):
        lt.verify(base, None, adapter)
    with pytest.raises(UsageError, match="no adapter"):
        lt.verify(base, base, [])
    other = save_peft(tmp_path / "other", {"model.layers.9.self_attn.q_proj": factors(24, 24)})
    with pytest.raises(DisagreementError, match=r"match(es)? no tensor"):
        lt.verify(base, base, other)


def test_a_merge_saved_by_a_head_model(tmp_path: Path) -> None:
    """The base bare, the merged one with the head model's prefix: one guess, and it is said."""
    state = {n: v for n, v in llama_like(torch.bfloat16).items() if n != "lm_head.weight"}
    bare = {name.removeprefix("model."): value for name, value in state.items()}
    base = save_folder(bare, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(base, adapter, tmp_path / "merged")
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    merged = {f"model.{name}": one for name, one in theirs.items()}
    report = lt.verify(save_folder(merged, tmp_path / "theirs", LLAMA), base, adapter)
    assert report.verdict == EXACT
    assert any("'model.'" in note and "merged checkpoint" in note for note in report.facts["notes"])
    merged["model.norm.weight"] += 1
    off = save_folder(merged, tmp_path / "off", LLAMA)
    (row,) = (row for row in lt.verify(off, base, adapter).rows if row.status != "equal")
    assert (row.name, row.status) == ("norm.weight", "changed without an update")


def test_a_merge_into_another_base(tmp_path: Path) -> None:
    """Nearly everything differs: the question is put, with two tensors that differ it is not."""
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    other = save_folder(moved(state), tmp_path / "other", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(other, adapter, tmp_path / "merged")
    question = "most tensors that no update names differ: was it merged into another base?"
    assert question in lt.verify(tmp_path / "merged", base, adapter).diagnosis
    few = state | {name: state[name] + 1 for name in ("model.norm.weight", "lm_head.weight")}
    report = lt.verify(save_folder(few, tmp_path / "few", LLAMA), base, adapter)
    assert question not in report.diagnosis


def test_a_merged_tensor_of_nan(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    state[f"{Q0}.weight"] = torch.full_like(state[f"{Q0}.weight"], torch.nan)
    (row,) = lt.verify(save_folder(state, tmp_path / "nan", LLAMA), base, adapter).updated
    assert (row.status, row.detail, row.fit) == (Status.OFF, "holds NaN or infinity", None)


# Claims ---------------------------------------------------------------------------------------


@pytest.fixture
def claim(tmp_path: Path) -> tuple[Path, Path, Path]:
    """adapter, base, tuned: a full-rank change, an adapter of rank 4."""
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    return tmp_path / "adapter", base, tuned


def test_an_extracted_adapter_is_what_it_claims(claim: tuple[Path, Path, Path]) -> None:
    report = lt.verify_adapter(*claim)
    assert report.verdict == AS_STATED
    assert report.relative_error is not None
    assert 0.1 < report.relative_error < 1
    assert all(row.measured == pytest.approx(row.stated, rel=1e-3, abs=1e-6) for row in report.rows)


def test_an_adapter_that_is_worse_than_its_report(claim: tuple[Path, Path, Path]) -> None:
    adapter, base, tuned = claim
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "q_proj.lora_B" in key)
    tensors[name] *= 0.8
    save_file(tensors, path, {"format": "pt"})
    report = lt.verify_adapter(adapter, base, tuned)
    assert report.verdict == DIFFERS
    worse = [row for row in report.rows if row.status is ClaimStatus.WORSE]
    assert len(worse) == 1
    assert "q_proj" in worse[0].name


def test_a_change_that_the_adapter_does_not_hold(claim: tuple[Path, Path, Path]) -> None:
    adapter, base, tuned = claim
    lt.extract(base, tuned, adapter, rank=4, exclude=["*.mlp.*"], overwrite=True)
    report = lt.verify_adapter(adapter, base, tuned)
    assert report.verdict == AS_STATED, "its report says what is left out"
    assert report.count(ClaimStatus.LEFT_OUT) == 4
    (adapter / "loratool_report.json").unlink()
    report = lt.verify_adapter(adapter, base, tuned)
    assert report.verdict == DIFFERS
    assert report.count(ClaimStatus.UNEXPLAINED) == 4
    lt.extract(base, tuned, adapter, rank="full", overwrite=True)
    (adapter / "loratool_report.json").unlink()
    assert lt.verify_adapter(adapter, base, tuned).verdict == UNSTATED


def test_a_claim_about_what_is_not_finite(claim: tuple[Path, Path, Path]) -> None:
    """Left out, as stated, it counts in no total; in anything else NaN is an error, as no NaN is
    more than what is stated."""
    adapter, base, tuned = claim
    state = load_folder(tuned)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = save_folder(state, tuned.parent / "broken", LLAMA)
    with pytest.raises(NonFiniteValues, match="up_proj"):
        lt.verify_adapter(adapter, base, broken)
    stated = lt.extract(base, broken, adapter, rank=4, exclude=["up_proj"], overwrite=True)
    report = lt.verify_adapter(adapter, base, broken)
    assert report.verdict == AS_STATED
    assert report.relative_error == pytest.approx(stated.relative_error)
    assert report.unsized == ["model.layers.0.mlp.up_proj.weight"]
    (adapter / "loratool_report.json").unlink()
    with pytest.raises(NonFiniteValues, match="up_proj"):
        lt.verify_adapter(adapter, base, broken)


def test_a_claim_about_tensors_that_did_not_change(claim: tuple[Path, Path, Path]) -> None:
    """An adapter that changes what did not change is not what led from one to the other."""
    adapter, base, _ = claim
    report = lt.verify_adapter(adapter, base, base)
    assert report.differs
    assert report.count(ClaimStatus.ALONE) == len(report.rows) > 0
    (adapter / "loratool_report.json").unlink()
    assert lt.verify_adapter(adapter, base, base).differs


def test_a_change_that_rounding_swallowed_is_no_contradiction(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a * 1e-4, b)}, lora_alpha=1)
    lt.merge(base, adapter, tmp_path / "merged")
    report = lt.verify_adapter(adapter, base, base)
    assert (report.verdict, report.count(ClaimStatus.POINTLESS)) == (UNSTATED, 1)


def test_what_is_stated_of_several_tensors_is_held_to_all_of_them(tmp_path: Path) -> None:
    """Gate and up of an expert are one matrix in the report: one may miss more than both."""
    state = mixture_like()
    tuned_state = moved(state)
    base = save_folder(state, tmp_path / "base", MIXTURE)
    tuned = save_folder(tuned_state, tmp_path / "tuned", MIXTURE)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    assert lt.verify_adapter(tmp_path / "adapter", base, tuned).verdict == AS_STATED
    gate = "model.layers.0.mlp.experts.1.gate_proj.weight"
    other = tuned_state | {gate: tuned_state[gate] + 0.01}
    another = save_folder(other, tmp_path / "another", MIXTURE)
    report = lt.verify_adapter(tmp_path / "adapter", base, another)
    assert report.verdict == DIFFERS
    assert gate in {row.name for row in report.rows if row.status is ClaimStatus.WORSE}


def test_wrappers_names_are_no_obstacle_to_verifying_a_claim(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder({f"module.{n}": t for n, t in state.items()}, tmp_path / "base", LLAMA)
    wrapped = {f"_orig_mod.{n}": t for n, t in moved(state).items()}
    tuned = save_folder(wrapped, tmp_path / "tuned", LLAMA)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    report = lt.verify_adapter(tmp_path / "adapter", base, tuned)
    assert report.verdict == AS_STATED
    for wrapper, side in (("module.", "base"), ("_orig_mod.", "tuned")):
        assert any(f"{wrapper!r} in {side}" in note for note in report.facts["notes"])


def test_a_claim_of_fused_layers_is_held_to_a_tuned_side_that_has_them_apart(
    tmp_path: Path,
) -> None:
    mlp = "model.layers.0.mlp"
    parts = {f"{mlp}.{part}_proj.weight": torch.randn(6, 8) for part in ("gate", "up")}
    fused = {f"{mlp}.gate_up_proj.weight": torch.cat(list(parts.values()))}
    base = save_folder(fused, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(parts), tmp_path / "tuned", LLAMA)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    report = lt.verify_adapter(tmp_path / "adapter", base, tuned)
    assert report.verdict == AS_STATED
    assert [row.name for row in report.rows] == list(fused)


def test_a_claim_of_tensors_that_tuned_stores_otherwise_is_not_confirmed(tmp_path: Path) -> None:
    state = mixture_like()
    base = save_folder(state, tmp_path / "base", MIXTURE)
    block = "model.layers.0.mlp.experts"
    changed = moved(state)
    down = [changed.pop(f"{block}.{e}.down_proj.weight") for e in range(4)]
    pairs = [
        torch.cat([changed.pop(f"{block}.{e}.{part}.weight") for part in ("gate_proj", "up_proj")])
        for e in range(4)
    ]
    changed |= {
        f"{block}.gate_up_proj": torch.stack(pairs),
        f"{block}.down_proj": torch.stack(down),
    }
    tuned = save_folder(changed, tmp_path / "tuned", MIXTURE)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    with pytest.raises(NothingMatches, match="12 tensors that the adapter changes are not in"):
        lt.verify_adapter(tmp_path / "adapter", base, tuned)


def test_a_claim_of_a_tied_table_that_tuned_stores_once(tmp_path: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    state = llama_like()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    changed = moved(state)
    del changed["lm_head.weight"]
    base = save_folder(state, tmp_path / "base", tied)
    tuned = save_folder(changed, tmp_path / "tuned", tied)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    assert lt.verify_adapter(tmp_path / "adapter", base, tuned).verdict == AS_STATED
