"""Extraction: errors as measured, nothing lost unsaid, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loratool as lt
from loratool.engine import Engine, NoProgress
from loratool.errors import (
    NonFiniteValues,
    NothingMatches,
    RangeOverflow,
    ShapeMismatch,
    Unplaced,
    UnsupportedInput,
    UsageError,
)
from loratool.ops.extract import run_extract
from loratool.ops.extract_plan import plan_extract
from loratool.ops.extract_report import Status
from loratool.ops.extract_tradeoff import rank_tradeoff
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, load_folder, moved, save_folder


def ulp_distance(first: torch.Tensor, second: torch.Tensor) -> int:
    """Largest distance in representable numbers."""
    width = torch.int32 if first.element_size() == 4 else torch.int16

    def ordered(value: torch.Tensor) -> torch.Tensor:
        bits = value.contiguous().view(width).long()
        return torch.where(bits < 0, -(bits & (2 ** (8 * value.element_size() - 1) - 1)), bits)

    return int((ordered(first) - ordered(second)).abs().max()) if first.numel() else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("like", ["llama", "gpt2"])
def test_full_rank_gives_back_the_tuned_model(
    tmp_path: Path, dtype: torch.dtype, like: str
) -> None:
    state = llama_like(dtype) if like == "llama" else gpt2_like(dtype)
    config = LLAMA if like == "llama" else GPT2
    base = save_folder(state, tmp_path / "base", config)
    tuned_state = moved(state)
    tuned = save_folder(tuned_state, tmp_path / "tuned", config)
    lt.extract(base, tuned, tmp_path / "adapter", rank="full", dtype="float32")
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert set(merged) == set(tuned_state)
    for name, value in tuned_state.items():
        # A float32 change W − W0 larger than W itself is not exact: one unit of the change then.
        delta = (value.double() - state[name].double()).abs()
        larger = delta > value.double().abs() if dtype == torch.float32 else delta < 0
        assert ulp_distance(merged[name][~larger], value[~larger]) <= 1
        missed = (merged[name].double() - value.double()).abs()
        assert bool((missed <= 2.0**-23 * delta)[larger].all())
    equal = sum(int((merged[n] == tuned_state[n]).sum()) for n in merged)
    total = sum(t.numel() for t in merged.values())
    print(f"{like} {dtype}: {100 * equal / total:.2f} % of the weights exactly equal")
    assert equal / total > (0.95 if dtype != torch.float32 else 0.2)


def test_stated_errors_are_the_true_ones(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    tuned_state = moved(state, size=0.05)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    updates = lt.open_adapter(tmp_path / "adapter").low_rank
    missed = total = 0.0
    for row in report.rows:
        delta = tuned_state[row.name].double() - state[row.name].double()
        total += delta.square().sum().item()
        if row.rank:
            rest = delta - updates[row.name].load().dense()
            assert row.relative_error == pytest.approx((rest.norm() / delta.norm()).item(), 1e-6)
            missed += rest.square().sum().item()
            best = torch.linalg.svdvals(delta)[row.rank :].norm().item()
            assert best <= rest.norm().item() <= best * 1.001 + 0.01 * delta.norm().item()
    assert report.relative_error == pytest.approx((missed / total) ** 0.5, 1e-6)
    assert report.energy == pytest.approx(total, 1e-9)


def test_a_low_rank_change_is_found_exactly(tmp_path: Path) -> None:
    state = {name: t for name, t in llama_like().items() if t.ndim == 2}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state, rank=2), tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=2)
    assert all(row.relative_error is not None and row.relative_error < 1e-5 for row in report.rows)
    by_rule = lt.extract(base, tuned, tmp_path / "by_rule", rank="error:0.001")
    assert {row.rank for row in by_rule.rows} == {2}


def test_every_tensor_has_one_row_and_unchanged_ones_no_factors(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned_state = {**state}
    name = "model.layers.1.mlp.up_proj.weight"
    tuned_state[name] = state[name] + 0.01 * torch.randn(state[name].shape)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    assert sorted(row.name for row in report.rows) == sorted(state)
    assert [row.name for row in report.rows if row.rank] == [name]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert list(lt.open_adapter(tmp_path / "adapter").updates) == [name]


def test_clamped_rank_is_said_and_patterned(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=20)
    clamped = [row for row in report.rows if row.clamped]
    assert {row.rank for row in clamped} == {12}
    assert all("k_proj" in row.name for row in clamped)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {12}
    with pytest.raises(UsageError, match="above the smaller side of every matrix"):
        lt.extract(base, tuned, tmp_path / "no", rank=25)


@pytest.mark.parametrize(("base_shards", "tuned_shards"), [(1, 3), (3, 1), (2, 3)])
def test_sharding_may_differ(tmp_path: Path, base_shards: int, tuned_shards: int) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA, base_shards)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA, tuned_shards)
    lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    one = save_folder(state, tmp_path / "base1", LLAMA)
    two = save_folder(moved(state), tmp_path / "tuned1", LLAMA)
    lt.extract(one, two, tmp_path / "adapter1", rank=3)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter1" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("base_prefix", "tuned_prefix"), [("transformer.", ""), ("", "transformer.")]
)
def test_prefixes_may_differ_and_names_are_the_full_models(
    tmp_path: Path, base_prefix: str, tuned_prefix: str
) -> None:
    state = gpt2_like(prefix=base_prefix)
    tuned_state = {
        tuned_prefix + name.removeprefix(base_prefix): value for name, value in moved(state).items()
    }
    base = save_folder(state, tmp_path / "base", GPT2)
    tuned = save_folder(tuned_state, tmp_path / "tuned", GPT2)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    assert any("prefix 'transformer.'" in note for note in report.notes)
    assert all(row.name.startswith("transformer.") for row in report.rows)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert set(merged) == set(state)
    norm = f"{base_prefix}ln_f.weight"
    assert torch.equal(merged[norm], tuned_state[f"{tuned_prefix}ln_f.weight"])


def test_bare_names_on_both_sides_get_the_head_models_prefix(tmp_path: Path) -> None:
    base = save_folder(gpt2_like(), tmp_path / "base", GPT2)
    tuned = save_folder(moved(gpt2_like()), tmp_path / "tuned", GPT2)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=3)
    assert all(row.name.startswith("transformer.") for row in report.rows)
    assert any("GPT2LMHeadModel adds" in note for note in report.notes)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_dtypes_may_differ(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    state = llama_like(dtypes[0])
    tuned_state = {name: value.to(dtypes[1]) for name, value in moved(state, size=0.05).items()}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    lt.extract(base, tuned, tmp_path / "adapter", rank="full", dtype="float32")
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    for name, value in load_folder(tmp_path / "merged").items():
        assert value.dtype == dtypes[0]
        assert torch.allclose(value.float(), tuned_state[name].float(), rtol=1e-2, atol=1e-5)


def test_unplaceable_changes_are_refused_by_name(tmp_path: Path) -> None:
    state = llama_like() | {"model.cls_token": torch.zeros(1, 24)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    with pytest.raises(Unplaced) as caught:
        lt.extract(base, tuned, tmp_path / "adapter", rank=2)
    assert caught.value.details == ("model.cls_token [1, 24]",)
    assert not (tmp_path / "adapter").exists()
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=2, drop_rest=True)
    assert {row.name for row in report.rows if row.status == "dropped"} == {
        name for name, value in state.items() if value.ndim == 1 or "cls" in name
    }
    assert 0 < report.left_out_share < 1


def test_refusals(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    out = tmp_path / "out"
    with pytest.raises(NothingMatches, match="nothing to extract"):
        lt.extract(base, save_folder(state, tmp_path / "same", LLAMA), out)
    other = {**moved(state), "lm_head.weight": torch.zeros(49, 24)}
    with pytest.raises(ShapeMismatch) as shapes:
        lt.extract(base, save_folder(other, tmp_path / "shrunk", LLAMA), out)
    assert shapes.value.details == ("lm_head.weight: base [50, 24], tuned [49, 24]",)
    assert "tokens removed" in (shapes.value.hint or "")
    short = {name: value for name, value in moved(state).items() if "layers.1" not in name}
    with pytest.raises(NothingMatches, match="5 tensors are in one checkpoint only"):
        lt.extract(base, save_folder(short, tmp_path / "short", LLAMA), out)
    sick = moved(state)
    sick["model.norm.weight"][4] = float("nan")
    with pytest.raises(NonFiniteValues, match=r"model.norm.weight: .* at \[4\] in tuned$"):
        lt.extract(base, save_folder(sick, tmp_path / "sick", LLAMA), out)
    far = moved(state)
    far["model.norm.weight"] = far["model.norm.weight"].double()
    far["model.norm.weight"][3] = 1e300
    with pytest.raises(RangeOverflow, match=r"model.norm.weight: the change at \[3\]"):
        lt.extract(base, save_folder(far, tmp_path / "far", LLAMA), out)
    assert not out.exists()


def test_threads_do_not_change_bytes(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like(torch.bfloat16)), tmp_path / "tuned", LLAMA)
    for workers in (1, 4):
        run_extract(plan_extract(base, tuned, tmp_path / f"a{workers}", rank=4), Engine(workers))
    assert (tmp_path / "a1" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a4" / "adapter_model.safetensors"
    ).read_bytes()


def test_the_report_travels_with_the_adapter_and_names_no_path(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=4, base_model="someone/base")
    text = (tmp_path / "adapter" / "loratool_report.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text) == json.loads(json.dumps(report.to_json()))
    assert lt.open_adapter(tmp_path / "adapter").base_model == "someone/base"
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_rank_options(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    report = lt.extract(
        base,
        tuned,
        tmp_path / "a",
        rank="energy:0.5",
        max_rank=6,
        multiple_of=2,
        rank_for={"mlp": 3, "layers.1.mlp": 5},
        targets="all-linear",
    )
    ranks = {row.name: row.rank for row in report.rows if row.rank}
    assert "lm_head.weight" not in ranks
    assert ranks["model.layers.0.mlp.up_proj.weight"] == 4
    assert ranks["model.layers.1.mlp.up_proj.weight"] == 6
    assert all(rank % 2 == 0 and rank <= 6 for rank in ranks.values())
    with pytest.raises(NothingMatches, match="'conv' matches nothing"):
        lt.extract(base, tuned, tmp_path / "b", rank_for={"conv": 3})


def test_limits_hold_whatever_the_rule_is(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    options: dict[str, Any] = {"drop_rest": True, "overwrite": True}
    for rule in ("budget:90%", "energy:0.99", "knee", "auto", "nuclear:0.99"):
        report = lt.extract(base, tuned, tmp_path / "a", rank=rule, max_rank=3, **options)
        ranks = {row.rank for row in report.rows if row.rank}
        assert ranks
        assert max(ranks) <= 3, rule
    capped = {"mlp.up_proj": "2"}
    report = lt.extract(base, tuned, tmp_path / "a", rank="budget:90%", rank_for=capped, **options)
    assert {row.rank for row in report.rows if "up_proj" in row.name} == {2}
    with pytest.raises(UsageError, match="a number that these may have at most"):
        lt.extract(base, tuned, tmp_path / "b", rank="budget:9%", rank_for={"mlp*": "energy:0.9"})
    for limit in ("min_rank", "max_rank", "multiple_of"):
        with pytest.raises(UsageError, match="--rank full stores the whole change"):
            lt.extract(base, tuned, tmp_path / "b", rank="full", **{limit: 2, **options})
    full: list[tuple[str, dict[str, Any]]] = [
        ("--rank-for up_proj=full", {"rank_for": {"up_proj": "full"}}),
        ("--conv-rank full", {"conv_rank": "full"}),
    ]
    for named, option in full:
        with pytest.raises(UsageError, match=f"{named} stores the whole change"):
            lt.extract(base, tuned, tmp_path / "b", rank=2, max_rank=3, **option, **options)


def test_budget_is_kept_and_beats_a_uniform_rank(tmp_path: Path) -> None:
    state = llama_like(layers=3)
    tuned_state = moved(state)
    loud = "model.layers.1.mlp.up_proj.weight"
    tuned_state[loud] = state[loud] + (tuned_state[loud] - state[loud]) * 20
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(tuned_state, tmp_path / "tuned", LLAMA)
    uniform = lt.extract(base, tuned, tmp_path / "u", rank=2, drop_rest=True)
    spent = lt.extract(
        base, tuned, tmp_path / "b", rank=f"budget:{uniform.adapter_parameters}", drop_rest=True
    )
    assert spent.adapter_parameters <= uniform.adapter_parameters
    assert spent.relative_error < 0.8 * uniform.relative_error
    ranks = {row.name: row.rank for row in spent.rows}
    assert ranks[loud] == max(rank for rank in ranks.values() if rank)
    assert any("budget" in note for note in spent.notes)
    for wrong in ("budget:", "budget:lots", "budget:0"):
        with pytest.raises(UsageError):
            lt.extract(base, tuned, tmp_path / "c", rank=wrong)
    half = sum(t.numel() for t in state.values()) // 2
    assert lt.extract(base, tuned, tmp_path / "d", rank="budget:50%", drop_rest=True)
    assert lt.open_adapter(tmp_path / "d").updates
    stored = sum(
        t.a.read().numel() + t.b.read().numel()
        for t in lt.open_adapter(tmp_path / "d").low_rank.values()
    )
    assert stored <= half


def test_tradeoff_tells_what_extraction_then_gives(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    plan = plan_extract(base, tuned, tmp_path / "a", drop_rest=True, dtype="float32")
    tradeoff = rank_tradeoff(plan, max_rank=None, engine=Engine(1), progress=NoProgress())
    assert not (tmp_path / "a").exists()
    row = next(row for row in tradeoff.rows if row.rank == 4)
    report = lt.extract(base, tuned, tmp_path / "a", rank=4, drop_rest=True, dtype="float32")
    matrices = [r for r in report.rows if r.rank]
    energy = sum(r.energy for r in matrices)
    missed = sum(r.energy * (r.relative_error or 0) ** 2 for r in matrices)
    assert row.parameters == report.adapter_parameters
    assert row.error == pytest.approx((missed / energy) ** 0.5, rel=1e-4)
    assert all(row.budget_error <= row.error + 1e-12 for row in tradeoff.rows)


def test_dtype_of_the_sketch(tmp_path: Path) -> None:
    """It may steer the method elsewhere, but what is said of the result stays true."""
    generator = torch.Generator().manual_seed(2)
    name = "model.layers.0.mlp.up_proj.weight"
    state = {name: torch.randn(700, 600, generator=generator)}
    left = torch.linalg.qr(torch.randn(700, 200, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(600, 200, generator=generator)).Q
    delta = (left * 0.9 ** torch.arange(200)) @ right.T
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder({name: state[name] + delta}, tmp_path / "tuned", LLAMA)
    true = torch.linalg.svdvals((state[name] + delta).double() - state[name].double())
    best = (true[16:].norm() / true.norm()).item()
    for dtype in ("float32", "bfloat16"):
        report = lt.extract(base, tuned, tmp_path / dtype, rank=16, sketch_dtype=dtype)
        (row,) = report.rows
        assert row.method == "block Krylov"
        assert best * (1 - 1e-6) <= (row.relative_error or 0) <= best * 1.001
        assert (row.relative_error or 0) / best - 1 <= (row.excess_bound or 0) + 1e-6
    one, two = (
        (tmp_path / dtype / "adapter_model.safetensors").read_bytes()
        for dtype in ("float32", "bfloat16")
    )
    assert one != two
    with pytest.raises(UsageError, match="unknown dtype of the sketch"):
        lt.extract(base, tuned, tmp_path / "no", rank=16, sketch_dtype="int8")


def test_stage_times_are_told_but_do_not_travel(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like()), tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=4)
    assert set(report.seconds) == {"read", "sketch", "orthogonalise", "certify", "write"}
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.timed_json()["seconds"] == report.seconds
    stored = json.loads((tmp_path / "adapter" / "loratool_report.json").read_text())
    assert "seconds" not in stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_whole_is_measured_like_what_is_factorised(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Only the size of its change is needed, so that is all that is kept in memory."""
    base = save_folder(llama_like(dtype), tmp_path / "base", LLAMA)
    tuned = save_folder(moved(llama_like(dtype)), tmp_path / "tuned", LLAMA)
    factorised = lt.extract(base, tuned, tmp_path / "a", rank=4)
    whole = lt.extract(base, tuned, tmp_path / "b", rank=4, exclude=["*.mlp.*", "*embed*"])
    left_out = {row.name: row for row in whole.rows if row.status == "excluded"}
    assert len(left_out) == 5
    for row in factorised.rows:
        if row.name in left_out:
            other = left_out[row.name]
            assert (row.delta_norm, row.base_norm) == (other.delta_norm, other.base_norm)
            assert (row.noise_floor, row.changed_share) == (other.noise_floor, other.changed_share)
    sick = moved(llama_like(dtype))
    sick["model.embed_tokens.weight"][37, 5] = float("nan")
    broken = save_folder(sick, tmp_path / "sick", LLAMA)
    with pytest.raises(NonFiniteValues, match=r"embed_tokens.weight: .* at \[37, 5\]"):
        lt.extract(base, broken, tmp_path / "c", rank=4, rank_for={"*embed*": "whole"})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
def test_what_is_left_out_need_not_be_numbers(tmp_path: Path, wrong: float) -> None:
    """It is said that its change is in no total, and an earlier run's finding of it goes on."""
    name = "model.embed_tokens.weight"
    base_state, state = llama_like(torch.float32), moved(llama_like(torch.float32))
    base_state[name][37, 5], state[name][37, 5] = -wrong, wrong
    base = save_folder(base_state, tmp_path / "base", LLAMA)
    tuned = save_folder(state, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "a", rank="full", exclude=["embed_tokens"])
    assert [row.name for row in report.rows if row.status is Status.NOT_MEASURED] == [name]
    assert [note for note in report.notes if "not measured" in note and name in note]
    assert report.relative_error == 0
    assert report.left_out_share == 0
    assert report.to_json()["totals"]["left_out"] == 1
    with pytest.raises(NothingMatches, match="no change is left") as refused:
        lt.extract(base, broken(base, tmp_path, name), tmp_path / "b", exclude=["embed_tokens"])
    assert refused.value.details == ("1 changed tensor: excluded and not measured",)


def broken(base: Path, folder: Path, name: str) -> Path:
    """A copy of a checkpoint with NaN in one tensor."""
    state = load_folder(base)
    state[name][0, 0] = float("nan")
    return save_folder(state, folder / "broken", LLAMA)


def test_no_number_in_a_kernel_is_placed_in_the_kernel(tmp_path: Path) -> None:
    state = llama_like() | {"conv.weight": torch.randn(300, 40, 5, 5)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    sick = moved(state)
    sick["conv.weight"][281, 7, 3, 2] = float("inf")
    tuned = save_folder(sick, tmp_path / "tuned", LLAMA)
    with pytest.raises(NonFiniteValues, match=r"conv.weight: .* at \[281, 7, 3, 2\]"):
        lt.extract(base, tuned, tmp_path / "a", rank=4)


def test_added_tokens_that_are_left_out_are_said(tmp_path: Path) -> None:
    """The adapter is for the base's own vocabulary then."""
    state = llama_like()
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    grown = {name: torch.cat([state[name], torch.ones(3, 24)]) for name in tables}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state) | grown, tmp_path / "tuned", LLAMA)
    lost = f"the 3 tokens that tuned added are left out with {' and '.join(sorted(tables))}"
    for number, options in enumerate(
        ({"drop_rest": True}, {"exclude": ["embed_tokens", "lm_head"]})
    ):
        report = lt.extract(base, tuned, tmp_path / f"a{number}", rank=2, **options)  # type: ignore[arg-type]
        assert lost in report.notes
        assert not any("resize_token_embeddings" in note for note in report.notes)
    report = lt.extract(base, tuned, tmp_path / "b", rank=2)
    assert "before loading the adapter, model.resize_token_embeddings(53)" in report.notes
    assert not any("left out" in note for note in report.notes)


def test_weights_in_8_bits_with_scales_are_not_compared(tmp_path: Path) -> None:
    """Their codes' difference is no change of weights."""
    q = "model.layers.0.self_attn.q_proj.weight"
    state = llama_like()
    scaled = state | {
        q: state[q].to(torch.float8_e4m3fn),
        f"{q}_scale_inv": torch.full((1, 1), 0.01),
    }
    plain = save_folder(state, tmp_path / "plain", LLAMA)
    base = save_folder(scaled, tmp_path / "base", LLAMA)
    codes = scaled | {q: (state[q] * 2).to(torch.float8_e4m3fn)}
    tuned = save_folder(codes, tmp_path / "tuned", LLAMA)
    for one, two, side in ((base, tuned, "base"), (plain, tuned, "tuned"), (base, plain, "base")):
        with pytest.raises(UnsupportedInput, match=f"{side}: 1 weight is stored in 8 bits"):
            lt.extract(one, two, tmp_path / "a", rank=2)
    with pytest.raises(UnsupportedInput, match="8 bits with scales"):
        lt.inspect(base, tuned, level="values")
    assert lt.inspect(base, tuned, level="values", only=["*norm*"])


def test_tensors_without_values_are_unchanged(tmp_path: Path) -> None:
    state = llama_like() | {"a.weight": torch.zeros(0, 8), "b.weight": torch.zeros(8, 0)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    for rank in ("2", "full", "budget:500"):
        report = lt.extract(base, tuned, tmp_path / "a", rank=rank, overwrite=True)
        status = {row.name: str(row.status) for row in report.rows}
        assert status["a.weight"] == status["b.weight"] == "unchanged"
    assert lt.inspect(base, tuned, level="values")


def test_a_matrix_of_the_model_itself_has_no_place(tmp_path: Path) -> None:
    """No module to adapt: neither PEFT nor merge would find it."""
    state = llama_like() | {"weight": torch.ones(8, 8)}
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state), tmp_path / "tuned", LLAMA)
    with pytest.raises(Unplaced, match="1 changed tensor has no place") as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=2)
    assert caught.value.details == ("weight [8, 8]",)


def test_a_head_that_tuned_unties_is_said_to_need_it_on_merging(tmp_path: Path) -> None:
    state = llama_like()
    head = state.pop("lm_head.weight")
    base = save_folder(state, tmp_path / "base", LLAMA | {"tie_word_embeddings": True})
    own = moved(state) | {"lm_head.weight": head}
    tuned = save_folder(own, tmp_path / "tuned", LLAMA)
    report = lt.extract(base, tuned, tmp_path / "a", rank=2)
    assert sum("merge_and_unload adds them to the one" in note for note in report.notes) == 1
    whole = lt.extract(base, tuned, tmp_path / "b", rank=2, exclude=["embed_tokens", "lm_head"])
    assert not any("merge_and_unload" in note for note in whole.notes)


def test_tied_tables_of_which_new_rows_are_stored_are_not_said_to_be_whole(tmp_path: Path) -> None:
    state = llama_like()
    del state["lm_head.weight"]
    tied = LLAMA | {"tie_word_embeddings": True}
    table = "model.embed_tokens.weight"
    base = save_folder(state, tmp_path / "base", tied)
    grown = moved(state) | {table: torch.cat([state[table], torch.ones(3, 24)])}
    report = lt.extract(base, save_folder(grown, tmp_path / "tuned", tied), tmp_path / "a", rank=2)
    assert report.count(Status.NEW_ROWS) == 1
    assert not any("are tied: stored whole" in note for note in report.notes)


def test_one_name_of_what_is_tied_is_not_left_out_alone(tmp_path: Path) -> None:
    """The other name would bring it back, whatever the report says."""
    tied = LLAMA | {"tie_word_embeddings": True}
    state = llama_like()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    changed = moved(state)
    changed["lm_head.weight"] = changed["model.embed_tokens.weight"].clone()
    base = save_folder(state, tmp_path / "base", tied)
    tuned = save_folder(changed, tmp_path / "tuned", tied)
    for options in ({"exclude": ["lm_head"]}, {"include": ["embed_tokens", "layers"]}):
        with pytest.raises(UsageError, match="tied, and only lm_head"):
            lt.extract(base, tuned, tmp_path / "a", rank=2, **options)  # type: ignore[arg-type]
    report = lt.extract(base, tuned, tmp_path / "a", rank=2, exclude=["lm_head", "embed_tokens"])
    assert report.count(Status.EXCLUDED) == 2


def test_two_stored_names_are_tied_only_where_their_values_are_equal(tmp_path: Path) -> None:
    """Whatever the config says: transformers ties no two that differ."""
    tied = LLAMA | {"tie_word_embeddings": True}
    apart = llama_like()
    equal = apart | {"lm_head.weight": apart["model.embed_tokens.weight"].clone()}
    tuned = save_folder(moved(apart), tmp_path / "tuned", tied)
    for name, state in (("equal", equal), ("apart", apart)):
        base = save_folder(state, tmp_path / name, tied)
        report = lt.extract(base, tuned, tmp_path / f"{name}-a", rank=2)
        kinds = {row.name: row.status for row in report.rows}
        assert kinds["lm_head.weight"] is kinds["model.embed_tokens.weight"] is Status.LOW_RANK
        untied = [note for note in report.notes if "loratool merge --untie" in note]
        assert len(untied) == (name == "equal")


def test_a_head_of_its_own_leaves_the_other_names_tied(tmp_path: Path) -> None:
    """T5: encoder and decoder share their table whether the head does or not."""
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    state = {"shared.weight": torch.randn(20, 8)}
    for side in ("encoder", "decoder"):
        state[f"{side}.block.0.layer.0.SelfAttention.q.weight"] = torch.randn(8, 8)
    base = save_folder(state, tmp_path / "base", config)
    own = moved(state) | {"lm_head.weight": torch.randn(20, 8)}
    tuned = save_folder(own, tmp_path / "tuned", config)
    lt.extract(base, tuned, tmp_path / "a", rank="full")
    adapter = lt.open_adapter(tmp_path / "a")
    shared = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(adapter.replacements) == shared
    assert "lm_head.weight" in adapter.low_rank
    lt.merge(base, tmp_path / "a", tmp_path / "merged", ties="apart")
    for name, value in load_folder(tmp_path / "merged").items():
        torch.testing.assert_close(value, own[name])
