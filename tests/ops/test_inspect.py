"""inspect's figures against numpy-style float64 computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.layouts.families import family_of, layer_of
from loratool.ops.inspect import AdapterReport, CheckpointReport, PairReport
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
    values = torch.linalg.svdvals(delta)[:3]
    energy, shares = values.square().cumsum(0) / values.square().sum(), values / values.sum()
    document = row.to_json()
    for share in (0.9, 0.95, 0.99):
        rank = int((energy < share).sum()) + 1
        assert row.rank_for(share) == document["rank_for"][f"{share:g}"] == rank
        assert report.adapter_bytes(share) == (rank * (24 + 24) * 4, False)
    entropy = -float((shares * shares.log()).sum())
    assert document["effective_rank"] == pytest.approx(2.718281828459045**entropy, rel=1e-9)
    participation = float(values.square().sum() ** 2 / (values**4).sum())
    assert document["participation_rank"] == pytest.approx(participation, rel=1e-9)


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


def lora_pair(folder: Path, dtype: torch.dtype, relative: float, tail: float) -> tuple[Path, Path]:
    """Two matrices changed by rank 4, of ``relative`` their norm, the second with a tail."""
    generator = torch.Generator().manual_seed(3)
    state, tuned_state = {}, {}
    for index, part in enumerate(("down_proj", "up_proj")):
        name = f"model.layers.0.mlp.{part}.weight"
        base = (torch.randn(200, 150, generator=generator) * 0.02).to(dtype)
        step = torch.randn(200, 4, generator=generator) @ torch.randn(4, 150, generator=generator)
        step *= relative * base.float().norm() / step.norm()
        if index:
            rest = torch.randn(200, 150, generator=generator)
            step += tail * step.norm() * rest / rest.norm()
        state[name], tuned_state[name] = base, (base.float() + step).to(dtype)
    base_path = save_folder(state, folder / "base", LLAMA)
    return base_path, save_folder(tuned_state, folder / "tuned", LLAMA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("relative", "tail", "ranks", "says"),
    [
        (0.02, 0.0, [4, 4], "a LoRA's of rank 4, to within rounding"),
        (0.02, 0.3, [4, None], "1 of 2 matrices changed as by a LoRA of rank 4"),
        (1e-8, 0.0, [None, None], "cannot be told"),
    ],
)
def test_was_it_a_lora(
    dtype: torch.dtype,
    relative: float,
    tail: float,
    ranks: list[int | None],
    says: str,
    tmp_path: Path,
) -> None:
    if relative < 1e-6 and dtype != torch.float32:
        relative = 3e-4 if dtype == torch.bfloat16 else 3e-5
    base, tuned = lora_pair(tmp_path, dtype, relative, tail)
    pair = lt.inspect(base, tuned)
    assert isinstance(pair, PairReport)
    extracted = lt.extract(base, tuned, tmp_path / "a", rank=8)
    for report in (pair, extracted):
        assert [row.lora_rank for row in report.rows] == ranks
        assert says in (report.lora_summary() or "")
        assert report.to_json()["lora"] == report.lora_summary()
        warned = [note for note in report.notes if "rounding of their stored values" in note]
        assert bool(warned) == (ranks == [None, None])
        assert all(row.near_noise == bool(warned) for row in report.rows)


def test_a_fine_tune_is_no_lora(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = save_folder(moved(state, size=0.05), tmp_path / "tuned", LLAMA)
    pair = lt.inspect(base, tuned)
    assert isinstance(pair, PairReport)
    assert (pair.lora_summary() or "").startswith("the change is no LoRA's of any rank below 32")
    extracted = lt.extract(base, tuned, tmp_path / "a", rank=4, drop_rest=True)
    assert "no LoRA's of any rank up to those extracted" in (extracted.lora_summary() or "")
    whole = lt.extract(base, tuned, tmp_path / "b", rank="full", drop_rest=True)
    assert whole.lora_summary() is None


def test_names() -> None:
    assert layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert layer_of("12.mlp") == 12
    assert layer_of("lm_head.weight") is None
    assert family_of("h.3.mlp.experts.7.w1.weight") == "h.*.mlp.experts.*.w1.weight"
