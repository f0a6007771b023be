"""What adapters amplify in their base, against dense singular value decompositions in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratool as lt
from loratool.errors import NonFiniteValues, NothingMatches, UnsupportedInput, UsageError
from loratool.ops.amplification import AmplificationReport
from tests.builders import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_weights,
    llama_weights,
    lora_factors,
    random_tensor,
    write_checkpoint,
    write_peft,
)
from tests.cli.invoke import invoke

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
ALPHA, RANK = 6, 3


def steep(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall by half each."""
    u = torch.linalg.qr(random_tensor(rows, rows, seed=seed).double()).Q
    v = torch.linalg.qr(random_tensor(columns, columns, seed=seed + 1).double()).Q
    k = min(rows, columns)
    return (u[:, :k] * 2.0 ** -torch.arange(k) @ v[:, :k].T).float()


def measured(adapter: Path, base: Path) -> dict[str, dict[str, object]]:
    report = lt.inspect(adapter, base=base)
    assert isinstance(report, AmplificationReport)
    return {row["name"]: row for row in report.to_json()["updates"]}


def expected(weight: Tensor, delta: Tensor, rank: int) -> dict[str, float]:
    """Everything by dense matrices, (out, in)."""
    w, d = weight.double(), delta.double()
    u, _, vh = torch.linalg.svd(d)
    wu, values, wvh = torch.linalg.svd(w)
    u, vh, wu, wvh = u[:, :rank], vh[:rank], wu[:, :rank], wvh[:rank]
    inside = float((u.T @ w @ vh.T).norm())
    return {
        "delta_norm": float(d.norm()),
        "base_norm": float(w.norm()),
        "inside": inside,
        "inside_own": float((wu.T @ w @ wvh.T).norm()),
        "amplification": float(d.norm()) / inside,
        "phi_left": float((u.T @ wu).square().sum()) / rank,
        "phi_right": float((vh @ wvh.T).square().sum()) / rank,
        "inside_own_too": float(values[:rank].norm()),
    }


def assert_same(found: dict[str, object], weight: Tensor, delta: Tensor, rank: int = RANK) -> None:
    wanted = expected(weight, delta, rank)
    assert wanted.pop("inside_own_too") == pytest.approx(wanted["inside_own"])
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=2e-5), key
    assert found["rank"] == rank
    assert found["shape"] == list(weight.shape)


def product(factors: dict[str, Tensor]) -> Tensor:
    a, b = factors.values()
    return ALPHA / a.shape[0] * (b.double() @ a.double())


def test_linear(tmp_path: Path) -> None:
    weights = llama_weights(width=20) | {f"{Q}.weight": steep(20, 20), f"{K}.weight": steep(10, 20)}
    base = write_checkpoint(tmp_path / "base", weights, LLAMA_CONFIG)
    q, k = lora_factors(Q, 20, 20, RANK, seed=4), lora_factors(K, 10, 20, RANK, seed=6)
    adapter = write_peft(tmp_path / "adapter", q | k, lora_alpha=ALPHA)
    found = measured(adapter, base)
    assert_same(found[f"{Q}.weight"], weights[f"{Q}.weight"], product(q))
    assert_same(found[f"{K}.weight"], weights[f"{K}.weight"], product(k))
    assert found[f"{K}.weight"]["phi_left_by_chance"] == RANK / 10
    assert found[f"{K}.weight"]["phi_right_by_chance"] == RANK / 20


def test_stored_in_out(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn"
    weights = gpt2_weights(width=12) | {f"{name}.weight": steep(12, 36)}
    base = write_checkpoint(tmp_path / "base", weights, GPT2_CONFIG)
    factors = lora_factors(name, 36, 12, RANK)
    adapter = write_peft(tmp_path / "adapter", factors, lora_alpha=ALPHA, fan_in_fan_out=True)
    found = measured(adapter, base)[f"{name}.weight"]
    assert_same(found, weights[f"{name}.weight"].T, product(factors))


def test_a_part_of_a_fused_weight(tmp_path: Path) -> None:
    """An adapter of v alone lies over v's rows of the fused q, k and v."""
    width = 12
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    config = {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": width,
        "num_attention_heads": 3, "num_key_value_heads": 3, "num_hidden_layers": 1,
    }  # fmt: skip
    parts = [steep(width, width, seed=seed) for seed in (0, 2, 4)]
    base = write_checkpoint(tmp_path / "base", {fused: torch.cat(parts)}, config)
    v_proj = "model.layers.0.self_attn.v_proj"
    factors = lora_factors(v_proj, width, width, RANK)
    adapter = write_peft(tmp_path / "adapter", factors, lora_alpha=ALPHA)
    assert_same(measured(adapter, base)[fused], parts[2], product(factors))


def test_an_update_along_the_weights_own_directions(tmp_path: Path) -> None:
    """φ is 1 there, ‖UᵀWV‖ is all that W has in r directions, and the factor follows."""
    weight = steep(20, 20)
    u, values, vh = torch.linalg.svd(weight.double())
    factors = {
        f"base_model.model.{Q}.lora_A.weight": vh[:RANK].float().contiguous(),
        f"base_model.model.{Q}.lora_B.weight": (u[:, :RANK] * values[:RANK]).float().contiguous(),
    }
    weights = llama_weights(width=20) | {f"{Q}.weight": weight}
    base = write_checkpoint(tmp_path / "base", weights, LLAMA_CONFIG)
    adapter = write_peft(tmp_path / "adapter", factors, lora_alpha=ALPHA)
    (row,) = measured(adapter, base).values()
    assert row["phi_left"] == pytest.approx(1, abs=1e-6)
    assert row["phi_right"] == pytest.approx(1, abs=1e-6)
    assert row["inside"] == pytest.approx(row["inside_own"], rel=1e-5)
    assert row["amplification"] == pytest.approx(ALPHA / RANK, rel=1e-5)


def test_chance_is_the_mean_over_random_directions(tmp_path: Path) -> None:
    weight = steep(20, 10)
    base = write_checkpoint(tmp_path / "base", {f"{Q}.weight": weight}, LLAMA_CONFIG)
    adapter = write_peft(tmp_path / "adapter", lora_factors(Q, 20, 10, RANK), lora_alpha=ALPHA)
    (row,) = measured(adapter, base).values()
    squares = []
    for seed in range(2000):
        u = torch.linalg.qr(random_tensor(20, RANK, seed=2 * seed)).Q
        v = torch.linalg.qr(random_tensor(10, RANK, seed=2 * seed + 1)).Q
        squares.append(float((u.T @ weight @ v).square().sum()))
    mean = math.sqrt(sum(squares) / len(squares))
    assert row["inside_by_chance"] == pytest.approx(mean, rel=0.05)


def test_an_untrained_adapter_amplifies_nothing(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_weights(), LLAMA_CONFIG)
    lt.init(base, tmp_path / "start", rank=2, targets="q,v")
    for row in measured(tmp_path / "start", base).values():
        assert row["rank"] == row["inside"] == row["delta_norm"] == 0
        assert row["amplification"] is None
        assert row["phi_left"] is None
    shown = invoke("inspect", tmp_path / "start", "--base", base)
    assert shown.code == 0, shown.err


def test_command_line(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_weights(layers=2), LLAMA_CONFIG)
    factors = lora_factors(Q, 8, 8, 2) | lora_factors(Q.replace("0", "1"), 8, 8, 2, seed=5)
    bias = {"base_model.model.model.norm.weight": torch.ones(8)}
    adapter = write_peft(tmp_path / "adapter", factors | bias)
    done = invoke("inspect", adapter, "--base", base, "--json")
    body = json.loads(done.out)
    assert (body["schema"], body["what"]) == ("loratool/inspect/1", "amplification")
    assert len(body["updates"]) == 2
    assert body["notes"] == ["left out: 1 update not of low rank"]
    shown = invoke("inspect", adapter, "--base", base)
    assert "‖ΔW‖ / ‖UᵀWV‖" in shown.out
    assert "left out" in shown.err


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    weights = llama_weights()
    base = write_checkpoint(tmp_path / "base", weights, LLAMA_CONFIG)
    adapter = write_peft(tmp_path / "adapter", lora_factors(Q, 8, 8, 2))
    with pytest.raises(UsageError, match="--base"):
        lt.inspect(base, base, base=base)
    other = write_peft(tmp_path / "other", lora_factors("model.x", 8, 8, 2))
    with pytest.raises(NothingMatches, match=r"match(es)? no tensor"):
        lt.inspect(other, base=base)
    whole = write_peft(tmp_path / "whole", {f"base_model.model.{Q}.weight": torch.ones(8, 8)})
    with pytest.raises(NothingMatches, match="no low-rank update"):
        lt.inspect(whole, base=base)
    broken = weights | {f"{Q}.weight": torch.full((8, 8), math.nan)}
    with pytest.raises(NonFiniteValues, match="q_proj"):
        lt.inspect(adapter, base=write_checkpoint(tmp_path / "nan", broken, LLAMA_CONFIG))
    eight = weights | {f"{Q}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    with pytest.raises(UnsupportedInput, match="F8_E4M3"):
        lt.inspect(adapter, base=write_checkpoint(tmp_path / "fp8", eight, LLAMA_CONFIG))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pair(family: str, tmp_path: Path) -> None:
    """A change with three equal singular values takes all of them to keep 90 %."""
    name = f"{Q}.weight" if family == "llama" else "transformer.h.0.attn.c_attn.weight"
    config = LLAMA_CONFIG if family == "llama" else GPT2_CONFIG
    weights = llama_weights() if family == "llama" else gpt2_weights()
    rows, columns = weights[name].shape
    weights[name] = steep(rows, columns)
    u = torch.linalg.qr(random_tensor(rows, 3, seed=5)).Q
    v = torch.linalg.qr(random_tensor(columns, 3, seed=6)).Q
    delta = 0.5 * u @ v.T
    tuned = weights | {name: weights[name] + delta}
    base = write_checkpoint(tmp_path / "base", weights, config)
    other = write_checkpoint(tmp_path / "tuned", tuned, config)
    report = lt.inspect(base, other, amplification=True)
    assert isinstance(report, AmplificationReport)
    assert report.of_pair
    (row,) = report.to_json()["updates"]
    assert row["name"] == name
    turned = [x.T if family == "gpt2" else x for x in (weights[name], delta)]
    wanted = expected(*turned, 3)
    del wanted["inside_own_too"]
    for key, value in wanted.items():
        assert row[key] == pytest.approx(value, rel=1e-4), key
    assert any("did not change" in note for note in report.notes)
    with pytest.raises(UsageError, match="of a pair"):
        lt.inspect(base, amplification=True)
    out = invoke("inspect", base, other, "--amplification").out
    assert "the change to tuned in base" in out
