"""What a merge would lose, against merges that did, and norms against full decompositions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.errors import NonFiniteValues, NothingMatches
from loratool.ops.inspect_forecast import ForecastReport
from tests.ops.builders import GPT2, LLAMA, State, gpt2_like, llama_like, save_folder, save_peft


def forecast(adapter: Path, base: Path, **options: object) -> ForecastReport:
    report = lt.inspect(adapter, base=base, level="values", **options)  # type: ignore[arg-type]
    assert isinstance(report, ForecastReport)
    return report


def adapter_for(state: State, modules: list[str], folder: Path, size: float) -> Path:
    """On weights stored (out, in)."""
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for module in modules:
        rows, columns = state[f"{module}.weight"].shape
        a = torch.randn(3, columns, generator=generator)
        pairs[module] = (a, torch.randn(rows, 3, generator=generator) * size)
    return save_peft(folder, pairs, lora_alpha=3)


MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in ("self_attn.q_proj", "mlp.up_proj")
]


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_foretells_what_merge_measures(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    state = llama_like(dtype)
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = adapter_for(state, MODULES, tmp_path / "a", size)
    report = forecast(adapter, base)
    for name, stored in (("bfloat16", "BF16"), ("float16", "F16")):
        merged = lt.merge(base, adapter, tmp_path / name, dtype=name, lost=True)
        by_name = {row.name: row.lost_share for row in merged.rows if row.update_energy}
        assert by_name.keys() == {row.name for row in report.rows}
        for row in report.rows:
            # where float32 rounds W + ΔW, merge's idea of the update is that much off
            assert row.lost_share(stored) == pytest.approx(by_name[row.name], rel=2e-2), row.name
        assert report.lost_share(stored) == pytest.approx(merged.lost_share, rel=2e-2)


def test_entries_that_rounding_swallows(tmp_path: Path) -> None:
    """W = 1 and an update of each size from far below half a unit in the last place to above."""
    name = "model.layers.0.self_attn.q_proj"
    ulp = {"BF16": 2.0**-7, "F16": 2.0**-10}
    sizes = torch.tensor([0.0, 0.2, 0.3, 0.49, 0.51])
    for dtype, unit in ulp.items():
        state = {f"{name}.weight": torch.ones(5, 4)}
        base = save_folder(state, tmp_path / f"base {dtype}", LLAMA)
        pairs = {name: (torch.ones(1, 4), (sizes * unit)[:, None])}
        adapter = save_peft(tmp_path / f"a {dtype}", pairs, lora_alpha=1)
        report = forecast(adapter, base)
        (row,) = report.rows
        assert row.touched == 16
        assert row.swallowed[dtype] == 12
        assert report.swallowed_share(dtype) == row.swallowed_share(dtype) == 0.75


def test_norms(tmp_path: Path) -> None:
    state = llama_like(torch.float32)
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = adapter_for(state, MODULES, tmp_path / "a", 0.1)
    factors = {row.name: row for row in lt.inspect(adapter).rows}  # type: ignore[union-attr]
    for row in forecast(adapter, base).rows:
        weight = torch.linalg.svdvals(state[row.name].double())
        assert row.base_spectral_norm == pytest.approx(float(weight[0]), rel=1e-6)
        assert row.spectral_norm == pytest.approx(factors[row.name].values[0], rel=1e-6)
        assert row.update_norm == pytest.approx(factors[row.name].norm, rel=1e-6)
        assert row.strength == pytest.approx(factors[row.name].values[0] / float(weight[0]))


def test_weights_stored_the_other_way_round(tmp_path: Path) -> None:
    state = gpt2_like()
    base = save_folder(state, tmp_path / "base", GPT2)
    a, b = torch.randn(2, 16), torch.randn(48, 2)
    pairs = {"transformer.h.0.attn.c_attn": (a, b)}
    adapter = save_peft(tmp_path / "a", pairs, fan_in_fan_out=True, lora_alpha=2)
    (row,) = forecast(adapter, base).rows
    values = torch.linalg.svdvals(b.double() @ a.double())
    assert row.update_norm == pytest.approx(float(values.norm()), rel=1e-6)
    assert row.spectral_norm == pytest.approx(float(values[0]), rel=1e-6)


def test_what_cannot_be_foretold(tmp_path: Path) -> None:
    state = llama_like()
    adapter = adapter_for(state, MODULES[:1], tmp_path / "a", 0.1)
    base = save_folder(state, tmp_path / "base", LLAMA)
    with pytest.raises(NothingMatches, match="norm"):
        forecast(adapter, base, only=["norm"])
    state[f"{MODULES[0]}.weight"][0, 0] = float("inf")
    broken = save_folder(state, tmp_path / "broken", LLAMA)
    with pytest.raises(NonFiniteValues, match="q_proj"):
        forecast(adapter, broken)
