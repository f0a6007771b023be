"""What ``loratool inspect`` says of inputs that are hardly there: equal, of integers, empty."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.builders import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_weights,
    lora_factors,
    write_checkpoint,
    write_peft,
)
from tests.cli.invoke import invoke
from tests.ops.builders import save_peft

Q = "model.layers.0.self_attn.q_proj"


def checkpoint(path: Path, **tensors: Tensor) -> Path:
    return write_checkpoint(path, {f"{Q}.{name}": t for name, t in tensors.items()}, LLAMA_CONFIG)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Equal in floats, not in integers."""
    weight, numbers = torch.ones(8, 8), torch.arange(8)
    base = checkpoint(tmp_path / "base", weight=weight, extra=torch.ones(3), g_idx=numbers)
    return base, checkpoint(
        tmp_path / "tuned", weight=weight, extra=torch.ones(3), g_idx=numbers + 1
    )


def test_only_what_was_compared_is_said_to_be_equal(pair: tuple[Path, Path]) -> None:
    ended = invoke("inspect", *pair)
    assert ended.out == "base and tuned hold the same values in all 2 tensors compared\n"
    assert "1 tensor of integers not compared" in ended.err
    ended = invoke("inspect", *pair, "--only", "weight")
    assert ended.out == "base and tuned hold the same values in the one tensor compared\n"
    ended = invoke("inspect", *pair, "--only", "g_idx")
    assert ended.out == "base and tuned: no tensor was compared\n"
    assert "1 tensor of integers not compared" in ended.err


def test_equal_values_in_another_dtype_are_said(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    tuned = checkpoint(tmp_path / "tuned", weight=torch.ones(8, 8).half())
    assert "1 tensor went from F32 to F16" in invoke("inspect", base, tuned).out


def test_a_change_from_zero_has_no_share(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weight=torch.zeros(8, 8))
    tuned = checkpoint(tmp_path / "tuned", weight=torch.ones(8, 8))
    out = invoke("inspect", base, tuned).out
    assert out.startswith("base → tuned: 1 of 1 tensor changed, from zero\n")


def test_a_matrix_of_one_row_is_not_said_to_be_of_no_rank(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    base = checkpoint(tmp_path / "base", weight=torch.randn(1, 9, generator=random))
    tuned = checkpoint(tmp_path / "tuned", weight=torch.randn(1, 9, generator=random))
    assert "of any rank below 32 and below the matrix's smaller side" in (
        invoke("inspect", base, tuned).out
    )


def test_integers_are_not_said_to_be_finite(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path / "whole", weight=torch.zeros(8, 8, dtype=torch.int8))
    out = invoke("inspect", whole, "--level", "values").out
    assert "all 1 tensor read: of integers, whose values are not judged" in out
    mixed = checkpoint(
        tmp_path / "mixed", weight=torch.ones(8, 8), extra=torch.ones(3), g_idx=torch.arange(8)
    )
    out = invoke("inspect", mixed, "--level", "values").out
    assert "all 3 tensors read: the 2 of floats are finite, without outliers and dead rows" in out


def test_a_matrix_without_values_has_no_spectrum(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "empty", weight=torch.ones(8, 0))
    ended = invoke("inspect", path, "--level", "spectra")
    assert ended.code == 0
    assert "no weight matrix among them that has a spectrum" in ended.out


def test_nan_in_an_adapter_is_named(tmp_path: Path) -> None:
    b = torch.ones(8, 2)
    b[3, 1] = float("nan")
    adapter = save_peft(tmp_path / "adapter", {Q: (torch.ones(2, 8), b)})
    for more in ([], [adapter]):
        ended = invoke("inspect", adapter, *more)
        assert ended.code == 3
        assert f"{Q}.weight: base_model.model.{Q}.lora_B.weight holds NaN or infinity" in ended.err


def test_an_update_of_zero_needs_no_rank_and_loses_nothing(tmp_path: Path) -> None:
    adapter = save_peft(tmp_path / "adapter", {Q: (torch.ones(2, 8), torch.zeros(8, 2))})
    ended = invoke("inspect", adapter, "--json")
    document = json.loads(ended.out)
    assert document["updates"][0]["rank_for"] == {"0.9": 0, "0.95": 0, "0.99": 0}
    assert document["adapter_bytes"]["0.99"] == {"bytes": 0, "at_least": False}
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    out = invoke("inspect", adapter, "--base", base, "--level", "values").out
    assert "the update is zero: there is nothing to lose" in out
    assert "stored in" not in out


def test_merged_values_beyond_a_dtype_are_counted(tmp_path: Path) -> None:
    a, b = torch.zeros(1, 8), torch.ones(8, 1)
    a[0, 0] = 1e6
    adapter = save_peft(tmp_path / "adapter", {Q: (a, b)})
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    command = ("inspect", adapter, "--base", base, "--level", "values")
    assert "8 merged values lie beyond the range of F16: merge refuses" in (invoke(*command).err)
    (row,) = json.loads(invoke(*command, "--json").out)["updates"]
    assert row["overflowed"] == {"BF16": 0, "F16": 8}
    assert invoke("merge", base, adapter, "-o", tmp_path / "m", "--dtype", "float16").code == 4


def test_an_update_beyond_float32_is_refused(tmp_path: Path) -> None:
    adapter = save_peft(
        tmp_path / "adapter", {Q: (torch.full((1, 8), 1e30), torch.full((8, 1), 1e30))}
    )
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    ended = invoke("inspect", adapter, "--base", base, "--level", "values")
    assert ended.code == 4
    assert "the update is too large to be measured" in ended.err


@pytest.mark.parametrize("columns", ["", "0", "-5", "wide", "120"])
def test_a_width_that_is_none_is_passed_over(
    columns: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    plain = invoke("inspect", pair[0])
    assert "g_idx" not in plain.out
    assert "parameters" in plain.out
    monkeypatch.setenv("COLUMNS", columns)
    assert invoke("inspect", pair[0]) == plain


def test_csv_holds_no_formula(tmp_path: Path) -> None:
    names = ["=1+1", "+x", "-x", "@x", "x=1"]
    path = write_checkpoint(tmp_path / "base", {name: torch.ones(2) for name in names})
    file = tmp_path / "table.csv"
    assert invoke("inspect", path, "--csv", file).code == 0
    shown = {row["name"] for row in csv.DictReader(file.read_text().splitlines())}
    assert shown == {"'=1+1", "'+x", "'-x", "'@x", "x=1"}


def test_a_long_name_leaves_room_for_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    base = write_checkpoint(tmp_path / "base", {f"{'x' * 300}.weight": torch.zeros(8, 8)})
    tuned = write_checkpoint(tmp_path / "tuned", {f"{'x' * 300}.weight": torch.ones(8, 8)})
    out = invoke("inspect", base, tuned).out
    assert "LoRA\n" in out
    assert out.count("x" * 30) >= 6


@pytest.mark.parametrize("command", ["inspect", "list"])
def test_a_table_replaces_nothing_but_a_table(command: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    ended = invoke(command, base, "--csv", weights)
    assert ended.code == 2
    assert "exists and is no table of loratool's" in ended.err
    assert weights.read_bytes() == before
    table = tmp_path / "table.csv"
    assert [invoke(command, base, "--csv", table).code for _ in range(2)] == [0, 0]
    assert invoke("inspect", base, base, "--csv", table).code == 0
    assert invoke("inspect", base, base, "--csv", table).code == 0


def test_an_adapter_beside_a_checkpoint_is_told_from_a_pair(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8))
    adapter = save_peft(tmp_path / "adapter", {Q: (torch.ones(2, 8), torch.ones(8, 2))})
    for two in ((base, adapter), (adapter, base)):
        ended = invoke("inspect", *two)
        assert ended.code == 2
        assert f"inspect {adapter} --base {base} tells what it does there" in ended.err


def test_exact_of_a_pair_goes_with_spectra(pair: tuple[Path, Path]) -> None:
    for level in ("headers", "values"):
        ended = invoke("inspect", *pair, "--level", level, "--exact")
        assert ended.code == 2
        assert "--exact: goes with --level spectra" in ended.err


def table(*command: object, at: Path) -> dict[str, dict[str, str]]:
    assert invoke(*command, "--csv", at).code == 0
    return {row["name"]: row for row in csv.DictReader(at.read_text().splitlines())}


def test_the_table_of_an_adapter_holds_what_was_read(tmp_path: Path) -> None:
    factors = lora_factors(Q, 8, 8, 2) | lora_factors("model.layers.0.self_attn.k_proj", 8, 8, 2)
    factors["base_model.model.lm_head.weight"] = torch.ones(4, 8)
    factors[f"base_model.model.{Q}.lora_magnitude_vector.weight"] = torch.ones(8)
    factors["base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"] = (
        torch.ones(8)
    )
    adapter = write_peft(
        tmp_path / "a", factors, use_dora=True, modules_to_save=["lm_head"], rank_pattern={}
    )
    at = tmp_path / "table.csv"
    rows = table("inspect", adapter, at=at)
    assert rows[f"{Q}.weight"]["update"].startswith("DoRA of rank 2")
    assert rows["lm_head.weight"]["dtype"] == "F32"
    rows = table("inspect", adapter, "--level", "values", at=at)
    assert float(rows["lm_head.weight"]["largest"]) == 1
    assert {f"{Q}.weight{part}" for part in (" A", " B", " magnitude")} < set(rows)


def test_the_table_of_a_pair_holds_what_did_not_change(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weight=torch.ones(8, 8), extra=torch.ones(3))
    tuned = checkpoint(tmp_path / "tuned", weight=torch.zeros(8, 8), extra=torch.ones(3))
    rows = table("inspect", base, tuned, at=tmp_path / "table.csv")
    assert {name: float(row["delta_norm"]) for name, row in rows.items()} == {
        f"{Q}.extra": 0.0,
        f"{Q}.weight": 8.0,
    }


def test_an_adapter_of_one_side_of_a_tie_can_be_looked_at(tmp_path: Path) -> None:
    """Merging it takes a choice; looking does not, and says what the change means."""
    base = write_checkpoint(tmp_path / "base", gpt2_weights(width=8), GPT2_CONFIG)
    factors = {
        "base_model.model.transformer.wte.lora_embedding_A": torch.ones(2, 16),
        "base_model.model.transformer.wte.lora_embedding_B": torch.ones(8, 2),
    } | lora_factors("transformer.h.0.mlp.c_fc", 32, 8, 2)
    adapter = write_peft(tmp_path / "adapter", factors, r=2, fan_in_fan_out=True)
    assert invoke("merge", base, adapter, "-o", tmp_path / "merged").code == 4
    for more in ((), ("--level", "values"), ("--intruders",)):
        ended = invoke("inspect", adapter, "--base", base, *more)
        assert ended.code == 0, ended.err
        assert "changes transformer.wte.weight alone; lm_head.weight changes with it" in ended.err
        assert more == ("--intruders",) or "transformer.wte" in ended.out


def test_adapters_in_8_bits_are_looked_at(tmp_path: Path) -> None:
    factors = {
        name: value.to(torch.float8_e4m3fn) for name, value in lora_factors(Q, 8, 8, 2).items()
    }
    adapter = write_peft(tmp_path / "adapter", factors)
    base = checkpoint(tmp_path / "base", weight=torch.eye(8))
    for command in (
        ("inspect", adapter),
        ("inspect", adapter, "--base", base),
        ("inspect", adapter, "--base", base, "--intruders"),
        ("compare", adapter, adapter),
        ("resize", adapter, "--rank", "1", "-o", tmp_path / "smaller"),
        ("combine", adapter, adapter, "-o", tmp_path / "sum"),
    ):
        ended = invoke(*command)
        assert ended.code == 0, (command, ended.err)
    exact = factors[f"base_model.model.{Q}.lora_B.weight"].double() @ (
        factors[f"base_model.model.{Q}.lora_A.weight"].double()
    )
    (row,) = json.loads(invoke("inspect", adapter, "--json").out)["updates"]
    assert row["norm"] == pytest.approx(2 * float(exact.norm()), rel=1e-9)
