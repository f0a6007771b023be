"""inspect's figures against numpy-style float64 computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.ops.inspect import AdapterReport, CheckpointReport, PairReport, family_of, layer_of
from tests.ops.builders import (
    GPT2,
    LLAMA,
    gpt2_like,
    llama_like,
    moved,
    save_folder,
    save_peft,
)


def test_checkpoint(tmp_path: Path) -> None:
    state = gpt2_like(torch.bfloat16, prefix="transformer.")
    report = lt.inspect(save_folder(state, tmp_path / "base", GPT2, shards=2))
    assert isinstance(report, CheckpointReport)
    assert report.parameters == sum(t.numel() for t in state.values())
    assert report.nbytes == 2 * report.parameters
    assert report.files == 2
    assert report.tied == "transformer.wte.weight = lm_head.weight"
    kinds = {row.kind: row.tensors for row in report.kinds}
    assert kinds == {"conv1d": 6, "embedding": 1, "position table": 1, "bias": 9, "norm": 3}


def test_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    adapter = save_peft(
        tmp_path / "a", {"model.layers.0.self_attn.q_proj": (a, b)}, lora_alpha=12, use_rslora=True
    )
    report = lt.inspect(adapter)
    assert isinstance(report, AdapterReport)
    (row,) = report.rows
    delta = 12 / 3**0.5 * b.double() @ a.double()
    assert (row.rank, row.alpha, row.scale) == (3, 12.0, pytest.approx(12 / 3**0.5))
    assert row.norm == pytest.approx(delta.norm().item(), rel=1e-9)
    assert list(row.values) == pytest.approx(torch.linalg.svdvals(delta)[:3].tolist(), rel=1e-9)
    assert row.stable_rank == pytest.approx(row.norm**2 / row.values[0] ** 2)
    assert report.parameters == a.numel() + b.numel()


def test_pair(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    tuned_state = moved(state, size=0.05)
    tuned_state["model.norm.weight"] = state["model.norm.weight"]
    base = save_folder(state, tmp_path / "base", LLAMA)
    report = lt.inspect(base, save_folder(tuned_state, tmp_path / "tuned", LLAMA))
    assert isinstance(report, PairReport)
    assert report.unchanged == ("model.norm.weight",)
    for row in report.rows:
        delta = tuned_state[row.name].double() - state[row.name].double()
        assert row.delta_norm == pytest.approx(delta.norm().item(), rel=1e-6)
        relative = delta.norm() / state[row.name].double().norm()
        assert row.relative_change == pytest.approx(relative.item(), rel=1e-6)
        if row.spectrum is not None:
            values = torch.linalg.svdvals(delta)
            assert torch.allclose(
                row.spectrum.values, values[: len(row.spectrum.values)], rtol=1e-5
            )


def test_inspecting_nothing_changed_is_an_answer(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    report = lt.inspect(base, base)
    assert isinstance(report, PairReport)
    assert report.rows == ()
    assert report.energy == 0


def test_names() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("12.mlp") == 12
    assert layer_of("lm_head.weight") is None
    assert family_of("h.3.mlp.experts.7.w1.weight") == "h.*.mlp.experts.*.w1.weight"
