"""An adapter at another rank: cut with the least error, padded without any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.adapter import DenseUpdate
from loratool.errors import NothingMatches, Unplaced, UsageError
from loratool.ops.resize import plan_resize
from tests.builders import lora_factors, snapshot, write_peft
from tests.ops.adapters import MODULES, adapter, convolution, ranks, updates
from tests.ops.test_combine import biased, dora, expert_updates, experts, saved

Q = "model.layers.0.self_attn.q_proj"


def same(one: Path, two: Path, error: float = 1e-6) -> bool:
    first, second = updates(one), updates(two)
    assert set(first) == set(second)
    return all(
        float((first[name] - second[name]).norm()) <= error * float(first[name].norm())
        for name in first
    )


def config(folder: Path) -> dict[str, object]:
    value = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": -3}}])
def test_a_cut_is_the_best_of_its_rank(tmp_path: Path, options: dict[str, object]) -> None:
    path = adapter(tmp_path / "a", 6, **options)
    report = lt.resize(path, tmp_path / "out", rank=2)
    before, after = updates(path), updates(tmp_path / "out")
    assert set(ranks(tmp_path / "out").values()) == {2}
    for row in report.rows:
        module = row.name.removesuffix(".weight")
        sigma = torch.linalg.svdvals(before[module])
        missed = float((before[module] - after[module]).norm())
        assert missed == pytest.approx(float(sigma[2:].square().sum().sqrt()), rel=1e-5)
        assert row.relative_error == pytest.approx(missed / float(sigma.norm()), rel=1e-5)
        assert (row.ranks, row.rank) == ((6,), 2)


@pytest.mark.parametrize("rule", ["energy:0.8", "error:0.5", "ratio:0.4", "stable", "quantile:0.7"])
def test_rules_look_at_the_update(tmp_path: Path, rule: str) -> None:
    path = adapter(tmp_path / "a", 6)
    lt.resize(path, tmp_path / "out", rank=rule)
    expected = {}
    for module, value in updates(path).items():
        sigma = torch.linalg.svdvals(value)[:6]
        share = sigma.square().cumsum(0) / sigma.square().sum()
        running = sigma.cumsum(0) / sigma.sum()
        expected[module] = {
            "energy:0.8": int((share < 0.8).sum()) + 1,
            "error:0.5": int((share < 0.75).sum()) + 1,
            "ratio:0.4": int((sigma >= 0.4 * sigma[0]).sum()),
            "stable": -int(-float(sigma.square().sum() / sigma[0] ** 2) // 1),
            "quantile:0.7": int((running < 0.7).sum()),
        }[rule]
    found = {
        module: update.rank for module, update in lt.open_adapter(tmp_path / "out").low_rank.items()
    }
    assert found == {f"{module}.weight": rank for module, rank in expected.items()}


def test_the_same_rank_keeps_the_bytes(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4, dtype=torch.bfloat16)
    report = lt.resize(path, tmp_path / "out", rank=4)
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert report.relative_error == 0


def test_balance_makes_new_factors(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4)
    lt.resize(path, tmp_path / "out", rank=4, balance=True)
    assert same(path, tmp_path / "out")
    for update in lt.open_adapter(tmp_path / "out").low_rank.values():
        b, a = update.b.read(), update.a.read()
        assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-4)
        assert torch.allclose(b.T @ b, torch.diag(b.norm(dim=0) ** 2), atol=1e-3)


@pytest.mark.parametrize("make", [adapter, convolution])
def test_growing_changes_nothing_and_can_be_trained(tmp_path: Path, make: object) -> None:
    assert callable(make)
    path = make(tmp_path / "a", 3)
    report = lt.resize(path, tmp_path / "out", rank=7, seed=5)
    assert report.relative_error == 0
    assert same(path, tmp_path / "out", 1e-15)
    old = load_file(path / "adapter_model.safetensors")
    for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        if "lora_A" in key:
            assert torch.equal(value[:3], old[key])
            assert 0.3 < float(value[3:].flatten(1).norm(dim=1).mean()) < 3
        else:
            assert torch.equal(value[:, :3], old[key])
            assert not bool(value[:, 3:].any())
    again = tmp_path / "again"
    lt.resize(path, again, rank=7, seed=5)
    lt.resize(path, tmp_path / "other", rank=7, seed=6)
    files = [p / "adapter_model.safetensors" for p in (tmp_path / "out", again, tmp_path / "other")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_convolutions_are_cut_as_matrices(tmp_path: Path) -> None:
    path = convolution(tmp_path / "a", 5)
    lt.resize(path, tmp_path / "out", rank=2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(tuple(value.shape) for value in tensors.values()) == [(2, 5, 3, 3), (8, 2, 1, 1)]
    u, s, vh = torch.linalg.svd(updates(path)["unet.conv"], full_matrices=False)
    assert torch.allclose(
        updates(tmp_path / "out")["unet.conv"], (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5
    )


@pytest.mark.parametrize(
    "options", [{}, {"alpha_pattern": {"q_proj": 7}}, {"rank_pattern": {}, "use_rslora": True}]
)
@pytest.mark.parametrize("rank", ["energy:0.7", "4", "9"])
def test_uniform_is_one_rank_and_one_scale(
    tmp_path: Path, options: dict[str, object], rank: str
) -> None:
    path = adapter(tmp_path / "a", 4, **options)
    lt.resize(path, tmp_path / "plain", rank=rank)
    lt.resize(path, tmp_path / "out", rank=rank, uniform=True)
    assert same(tmp_path / "plain", tmp_path / "out")
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(config(tmp_path / "out"))
    assert len(set(ranks(tmp_path / "out").values())) == 1


def test_uniform_where_some_factors_stay_and_others_are_cut(tmp_path: Path) -> None:
    low = lora_factors(Q, 20, 24, 4)
    low[f"base_model.model.{Q}.lora_B.weight"][:, 2:] = 0
    path = adapter(tmp_path / "a", 4, extra=low, lora_alpha=12)
    lt.resize(path, tmp_path / "out", rank="full", uniform=True)
    assert same(path, tmp_path / "out")
    assert config(tmp_path / "out")["lora_alpha"] == 12
    assert "alpha_pattern" not in config(tmp_path / "out")


def test_a_profile_decides_the_form(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4)
    lt.resize(path, tmp_path / "out", rank=6, profile="vllm")
    assert set(ranks(tmp_path / "out").values()) == {8}
    assert same(path, tmp_path / "out")
    with pytest.raises(Unplaced, match="vllm does not take"):
        lt.resize(saved(tmp_path / "b", torch.ones(2, 3)), tmp_path / "no", rank=4, profile="vllm")


def test_what_a_profile_does_not_take_is_said_while_planning(tmp_path: Path) -> None:
    """resize has no --exclude: nothing could be left out."""
    for path in (dora(tmp_path / "a"), saved(tmp_path / "b", torch.ones(2, 3))):
        with pytest.raises(Unplaced, match="vllm does not take") as raised:
            plan_resize(path, tmp_path / "out", rank=4, profile="vllm")
        assert "--profile peft" in str(raised.value.hint)


def test_a_budget_is_spent_where_it_helps(tmp_path: Path) -> None:
    strong = lora_factors(Q, 20, 24, 6)
    weak = {k: v * 1e-2 for k, v in lora_factors("model.layers.0.mlp.up_proj", 40, 24, 6).items()}
    path = write_peft(tmp_path / "a", strong | weak)
    report = lt.resize(path, tmp_path / "out", rank="budget:200")
    assert report.adapter_parameters <= 200
    assert any("of the budget's 200" in note for note in report.notes)
    assert {row.name: row.rank for row in report.rows} == {f"{Q}.weight": 4}
    with pytest.raises(NothingMatches, match="holds no component"):
        lt.resize(path, tmp_path / "none", rank="budget:3")
    for options in ({"uniform": True}, {"max_rank": 3}, {"profile": "vllm"}):
        with pytest.raises(UsageError, match="a budget goes with no"):
            lt.resize(path, tmp_path / "none", rank="budget:200", **options)  # type: ignore[arg-type]


def test_experts_keep_one_rank(tmp_path: Path) -> None:
    path = experts(tmp_path / "a", 4, 0)
    lt.resize(path, tmp_path / "out", rank="energy:0.7")
    before, after = expert_updates(path), expert_updates(tmp_path / "out")
    for name, value in before.items():
        share = float((value - after[name]).square().sum() / value.square().sum())
        assert share <= 0.3
    lt.resize(path, tmp_path / "grown", rank=6)
    assert all(torch.equal(before[n], v) for n, v in expert_updates(tmp_path / "grown").items())


def test_what_is_stored_whole_stays(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", torch.arange(6.0).reshape(2, 3))
    lt.resize(path, tmp_path / "out", rank=2)
    kept = lt.open_adapter(tmp_path / "out").replacements["score.weight"].value.read()
    assert torch.equal(kept, torch.arange(6.0).reshape(2, 3))


def test_updates_of_nothing_are_absent(tmp_path: Path) -> None:
    zero = {key: value * 0 for key, value in lora_factors(Q, 20, 24, 4).items()}
    path = adapter(tmp_path / "a", 4, extra={f"{k}": v for k, v in zero.items()})
    report = lt.resize(path, tmp_path / "out", rank=2)
    assert set(updates(tmp_path / "out")) == set(MODULES) - {Q}
    assert any("1 update is zero" in note for note in report.notes)
    with pytest.raises(NothingMatches, match="nothing is left"):
        lt.resize(path, tmp_path / "none", rank="absolute:1e9")


def test_a_narrower_dtype_is_part_of_the_error(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 4)
    report = lt.resize(path, tmp_path / "out", rank=4, dtype="bfloat16")
    before, after = updates(path), updates(tmp_path / "out")
    for row in report.rows:
        module = row.name.removesuffix(".weight")
        missed = float((before[module] - after[module]).norm() / before[module].norm())
        assert row.relative_error == pytest.approx(missed, rel=1e-9)
        assert 1e-4 < missed < 1e-2


@pytest.mark.parametrize("rank", ["0", "-1", "many", "energy:2", "budget:much", "budget:0"])
def test_ranks_that_make_no_sense(tmp_path: Path, rank: str) -> None:
    path = adapter(tmp_path / "a", 4)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError):
        lt.resize(path, tmp_path / "out", rank=rank)
    assert snapshot(tmp_path) == before


def magnitudes(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path / "adapter_model.safetensors")
    return {key: value for key, value in tensors.items() if "magnitude" in key}


@pytest.mark.parametrize("rank", ["2", "7", "full"])
def test_dora_keeps_its_magnitudes(tmp_path: Path, rank: str) -> None:
    path = dora(tmp_path / "a")
    report = lt.resize(path, tmp_path / "out", rank=rank)
    assert config(tmp_path / "out")["use_dora"] is True
    one, two = magnitudes(path), magnitudes(tmp_path / "out")
    assert len(one) == len(MODULES)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any("4 updates are DoRA's" in note for note in report.notes)
    plain = adapter(tmp_path / "plain")
    lt.resize(plain, tmp_path / "cut", rank=rank)
    assert same(tmp_path / "cut", tmp_path / "out", 1e-15)
    assert (report.relative_error > 0.1) == (rank == "2")


def test_dora_of_nothing_is_still_dora(tmp_path: Path) -> None:
    """Its magnitudes act without the factors, so PEFT needs factors of zero."""
    key = f"base_model.model.{Q}.lora_B.weight"
    path = dora(tmp_path / "a")
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(tensors | {key: 0 * tensors[key]}, path / "adapter_model.safetensors")
    lt.resize(path, tmp_path / "out", rank=2)
    assert set(magnitudes(tmp_path / "out")) == set(magnitudes(path))
    assert ranks(tmp_path / "out")[key.replace("_B", "_A")] == 1
    assert float(updates(tmp_path / "out")[Q].norm()) == 0


@pytest.mark.parametrize("uniform", [False, True])
def test_bias_differences_stay_what_they_add(tmp_path: Path, uniform: bool) -> None:
    path = biased(tmp_path / "a", 4, 0, alpha_pattern={"q_proj": 6})
    lt.resize(path, tmp_path / "out", rank=2, uniform=uniform)
    before, after = lt.open_adapter(path), lt.open_adapter(tmp_path / "out")
    assert set(before.others) == set(after.others) != set()
    for name, old in before.others.items():
        new = after.others[name]
        assert isinstance(old, DenseUpdate)
        assert isinstance(new, DenseUpdate)
        expected = old.scale * old.value.read().double()
        assert torch.allclose(new.scale * new.value.read().double(), expected, rtol=1e-6)


def test_every_embedding_keeps_its_form(tmp_path: Path) -> None:
    keys = {
        "base_model.model.wte.lora_embedding_A": torch.randn(4, 50),
        "base_model.model.wte.lora_embedding_B": torch.randn(8, 4),
    }
    path = adapter(tmp_path / "a", 4, extra=keys)
    for rank in (2, 6):
        lt.resize(path, tmp_path / f"out-{rank}", rank=rank)
        stored = load_file(tmp_path / f"out-{rank}" / "adapter_model.safetensors")
        assert stored["base_model.model.wte.lora_embedding_A"].shape == (rank, 50)
    assert same(path, tmp_path / "out-6", 1e-15)
