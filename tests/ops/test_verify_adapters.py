"""verify where several adapters meet, where weights have 8 bits, and where dtypes are odd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratool as lt
from loratool.ops.verify_report import VerifyReport
from loratool.ops.verify_row import Cause, Status
from tests.builders import random_tensor
from tests.ops.builders import LLAMA, llama_like, load_folder, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors
from tests.ops.test_merge_scaled import BLOCK, BLOCKED, GRID, NAME, base_state, pair, spread

FIRST = {Q0: factors(24, 24), DOWN1: factors(24, 40)}
SECOND = {Q0: factors(24, 24, seed=7)}
WEIGHTS = (0.7, -1.5)


def delta(pairs: dict[str, tuple[Tensor, Tensor]], name: str) -> Tensor:
    if name not in pairs:
        return torch.zeros(())
    a, b = pairs[name]
    return 2 * (b.double() @ a.double())


def verified(folder: Path, true: tuple[float, float], dtype: torch.dtype) -> VerifyReport:
    """verify's answer where the adapters are in with ``true`` times their weights."""
    state = llama_like(dtype)
    merged = dict(state)
    for module in (Q0, DOWN1):
        total = state[f"{module}.weight"].double()
        for pairs, weight, factor in zip((FIRST, SECOND), WEIGHTS, true, strict=True):
            total = total + weight * factor * delta(pairs, module)
        merged[f"{module}.weight"] = total.to(dtype)
    base = save_folder(state, folder / "base", LLAMA)
    adapters = [
        (save_peft(folder / name, pairs, lora_alpha=6), weight)
        for name, pairs, weight in zip(("one", "two"), (FIRST, SECOND), WEIGHTS, strict=True)
    ]
    return lt.verify(save_folder(merged, folder / "merged", LLAMA), base, adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("true", [(0.5, 1.25), (1.0, 0.8), (2.0, -1.0)])
def test_the_scale_of_each_is_estimated(
    tmp_path: Path, true: tuple[float, float], dtype: torch.dtype
) -> None:
    report = verified(tmp_path, true, dtype)
    assert report.fits == {index: pytest.approx(one, rel=5e-3) for index, one in enumerate(true)}
    (q,) = [row for row in report.rows if row.name == f"{Q0}.weight"]
    assert q.cause is Cause.SCALE
    assert q.residual is not None
    assert q.residual < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    line = next(line for line in report.diagnosis if "wrong scales" in line)
    assert " times one, " in line
    assert line.endswith(" times two")


def test_one_of_two_is_missing(tmp_path: Path) -> None:
    report = verified(tmp_path, (1.0, 0.0), torch.bfloat16)
    (q,) = [row for row in report.rows if row.name == f"{Q0}.weight"]
    assert q.cause is Cause.PART
    assert [(one.adapter, round(one.fit, 2)) for one in q.fits] == [(0, 1.0), (1, 0.0)]
    assert any("not all adapters are in; what fits is 1" in line for line in report.diagnosis)


def test_adapters_that_are_alike_are_not_told_apart(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "one", SECOND, lora_alpha=6)
    merged = dict(state)
    merged[f"{Q0}.weight"] = (state[f"{Q0}.weight"].double() + 3 * delta(SECOND, Q0)).float()
    folder = save_folder(merged, tmp_path / "merged", LLAMA)
    report = lt.verify(folder, base, [(adapter, 0.5), (adapter, 0.5)])
    assert report.fit == pytest.approx(3)
    assert report.fits == {}
    assert "3 times the update fits" in report.diagnosis[0]


@pytest.mark.parametrize(
    ("factor", "cause"),
    [(0.5, Cause.SCALE), (2.0, Cause.TWICE), (0.0, Cause.NOT_APPLIED), (-1.0, Cause.SUBTRACTED)],
)
def test_weights_of_8_bits(tmp_path: Path, factor: float, cause: Cause) -> None:
    state = base_state("weight_scale_inv", GRID)
    base = save_folder(state, tmp_path / "base", BLOCKED)
    a, b = pair()
    adapter = save_peft(tmp_path / "a", {NAME: (a * 8, b)}, lora_alpha=2)
    scales = spread(GRID, (BLOCK, BLOCK))
    moved = state[f"{NAME}.weight"].double() * scales + factor * 8 * (b.double() @ a.double())
    merged = state | {f"{NAME}.weight": (moved / scales).clamp(-448, 448).to(torch.float8_e4m3fn)}
    report = lt.verify(save_folder(merged, tmp_path / "m", BLOCKED), base, adapter)
    (row,) = report.updated
    assert row.cause is cause
    assert report.fit == pytest.approx(factor, abs=0.05)


def test_a_sum_in_float32_of_8_bits_is_within_rounding(tmp_path: Path) -> None:
    """As others merge: dequantised, summed, quantised again."""
    state = base_state("weight_scale_inv", GRID)
    base = save_folder(state, tmp_path / "base", BLOCKED)
    a, b = pair()
    adapter = save_peft(tmp_path / "a", {NAME: (a, b)}, lora_alpha=2)
    lt.merge(base, adapter, tmp_path / "m")
    merged = load_folder(tmp_path / "m")
    merged[f"{NAME}.weight"].view(torch.uint8)[3, 4] ^= 1
    report = lt.verify(save_folder(merged, tmp_path / "m2", BLOCKED), base, adapter)
    (row,) = report.updated
    assert (row.status, row.different) == (Status.ROUNDING, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_merged_dtype_that_no_sum_is_stored_in(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "a", SECOND, lora_alpha=6)
    state = llama_like()
    state[f"{Q0}.weight"] = state[f"{Q0}.weight"].to(dtype)
    report = lt.verify(save_folder(state, tmp_path / "m", LLAMA), base, adapter)
    (row,) = report.updated
    assert row.status is Status.SHAPE
    assert row.detail.startswith("F32 in the base, F")


def test_8_bits_that_were_unpacked(tmp_path: Path) -> None:
    state = base_state("weight_scale_inv", GRID)
    base = save_folder(state, tmp_path / "base", BLOCKED)
    adapter = save_peft(tmp_path / "a", {NAME: pair()}, lora_alpha=2)
    state[f"{NAME}.weight"] = random_tensor(20, 12)
    report = lt.verify(save_folder(state, tmp_path / "m", BLOCKED), base, adapter)
    assert report.updated[0].status is Status.SHAPE


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}])
def test_a_merged_config_that_unties_what_was_never_tied(
    tmp_path: Path, said: dict[str, bool]
) -> None:
    """As other tools write it: the base's config is silent, or wrong about the head it stores."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    base = save_folder(llama_like(), tmp_path / "base", config | said)
    adapter = save_peft(tmp_path / "a", SECOND, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert lt.verify(tmp_path / "m", base, adapter).is_equal
    headless = {n: v for n, v in llama_like().items() if "lm_head" not in n}
    bare = save_folder(
        headless, tmp_path / "bare", {"model_type": "llama", "architectures": ["LlamaModel"]}
    )
    lt.merge(bare, adapter, tmp_path / "m2")
    (tmp_path / "m2" / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert lt.verify(tmp_path / "m2", bare, adapter).is_equal
