"""Merging into 8-bit checkpoints that hold scales, as transformers and vLLM read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.algebra.certified_scaled import spacing
from loratool.errors import RangeOverflow, UnsupportedInput
from tests.algebra.test_certified_scaled import Fraction as Exact
from tests.algebra.test_certified_scaled import nearest
from tests.faults.killing import bytes_of
from tests.ops.builders import LLAMA, load_folder, save_folder, save_peft

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, BLOCK = 20, 12, 8
FP8 = torch.float8_e4m3fn


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(2, COLUMNS, generator=generator) * 0.1
    return a, torch.randn(ROWS, 2, generator=generator) * 0.1


def base_state(
    scale_name: str | None, scales: Tensor | None, dtype: torch.dtype = FP8
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = (torch.randn(ROWS, COLUMNS, generator=generator) * 60).to(dtype)
    state = {f"{NAME}.weight": q, "model.norm.weight": torch.ones(4)}
    if scale_name is not None and scales is not None:
        state[f"{NAME}.{scale_name}"] = scales
    return state


def spread(scales: Tensor, block: tuple[int, int]) -> Tensor:
    """One scale per weight."""
    grid = scales.double().reshape(-(-ROWS // block[0]), -(-COLUMNS // block[1]))
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:ROWS, :COLUMNS]


GRID = torch.tensor([[0.001, 0.02], [0.003, 0.004], [0.01, 0.0007]])
ROW = torch.linspace(0.001, 0.01, ROWS)[:, None]
BLOCKED = LLAMA | {"quantization_config": {"weight_block_size": [BLOCK, BLOCK]}}
GROUPED = LLAMA | {
    "quantization_config": {
        "config_groups": {"group_0": {"weights": {"block_structure": [BLOCK, BLOCK]}}}
    }
}


@pytest.mark.parametrize(
    ("name", "scales", "block", "config"),
    [
        ("weight_scale_inv", GRID, (BLOCK, BLOCK), BLOCKED),
        ("weight_scale", GRID.bfloat16(), (BLOCK, BLOCK), GROUPED),
        ("weight_scale", ROW, (1, COLUMNS), LLAMA),
        ("weight_scale", ROW.flatten().bfloat16(), (1, COLUMNS), LLAMA),
        ("weight_scale", torch.tensor(0.004), (ROWS, COLUMNS), LLAMA),
        ("weight_scale_inv", torch.tensor([0.004]), (ROWS, COLUMNS), LLAMA),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_stay_and_weights_are_nearest(
    tmp_path: Path,
    name: str,
    scales: Tensor,
    block: tuple[int, int],
    config: dict[str, object],
    dtype: torch.dtype,
) -> None:
    state = base_state(name, scales, dtype)
    base = save_folder(state, tmp_path / "base", config)
    a, b = pair()
    adapter = save_peft(tmp_path / "adapter", {NAME: (a, b)}, lora_alpha=2)
    report = lt.merge(base, adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert merged.keys() == state.keys()
    grid = spread(scales, block)
    delta = b.double() @ a.double()  # two terms: exact up to the last bits of float64
    got = merged[f"{NAME}.weight"].view(torch.uint8)
    q = state[f"{NAME}.weight"]
    for i in range(ROWS):
        for j in range(COLUMNS):
            exact = sum(Exact(float(b[i, k])) * Exact(float(a[k, j])) for k in range(2))
            target = Exact(float(q[i, j].double())) * Exact(float(grid[i, j])) + exact
            code = int(q.view(torch.uint8)[i, j])
            assert got[i, j] == nearest(target, float(grid[i, j]), code, dtype)
    assert torch.equal(merged[f"{NAME}.{name}"].double(), scales.double())
    assert report.total("changed") == int((got != q.view(torch.uint8)).sum()) > 0
    before, after = q.double() * grid, merged[f"{NAME}.weight"].double() * grid
    assert (after - before - delta).norm() < (after - before).norm()
    lt.merge_in_place(base, adapter)
    assert bytes_of(base) == bytes_of(tmp_path / "merged")


def test_what_8_bits_do_not_take(tmp_path: Path) -> None:
    adapter = save_peft(tmp_path / "adapter", {NAME: pair()}, lora_alpha=2)
    plain = save_folder(base_state(None, None), tmp_path / "plain", LLAMA)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedInput, match="8 bits without scales") as refused:
        lt.merge(plain, adapter, out)
    assert "--allow-lossy" in str(refused.value.hint)
    lt.merge(plain, adapter, tmp_path / "lossy", allow_lossy=True)
    q = base_state(None, None)[f"{NAME}.weight"].double()
    lossy = load_folder(tmp_path / "lossy")[f"{NAME}.weight"].double()
    a, b = pair()
    assert ((lossy - q - b.double() @ a.double()).abs() <= q.abs() / 16 + 2**-9).all()

    scaled = base_state("weight_scale", torch.tensor(1e-4))
    base = save_folder(scaled, tmp_path / "base", LLAMA)
    with pytest.raises(RangeOverflow, match="F8_E4M3"):
        lt.merge(base, adapter, out, scale=1e3)
    odd = save_folder(base_state("weight_scale", torch.ones(3)), tmp_path / "odd", LLAMA)
    with pytest.raises(UnsupportedInput, match="fits no known scaling"):
        lt.merge(odd, adapter, out)
    whole = tmp_path / "whole"
    whole.mkdir()
    name = f"base_model.model.{NAME}.weight"
    save_file({name: torch.ones(ROWS, COLUMNS)}, whole / "adapter_model.safetensors")
    (whole / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["up_proj"], '
        '"target_modules": ["x"]}'
    )
    with pytest.raises(UnsupportedInput, match="which only LoRA, DoRA, LoHa and LoKr can change"):
        lt.merge(base, whole, out)
    assert not out.exists()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_receipt_undoes_it(tmp_path: Path, dtype: torch.dtype, scaled: bool) -> None:
    scales = ("weight_scale_inv", GRID) if scaled else (None, None)
    base = save_folder(base_state(*scales, dtype), tmp_path / "base", BLOCKED)
    a, b = pair()
    factor = 1 if scaled else 1000  # so that more than a few weights change
    adapter = save_peft(tmp_path / "adapter", {NAME: (a * factor, b)}, lora_alpha=2)
    other = save_peft(tmp_path / "other", {NAME: (a * 2 * factor, b)}, lora_alpha=3)
    merged, allowed = tmp_path / "merged", {"receipt": True, "allow_lossy": not scaled}
    report = lt.merge(base, adapter, merged, **allowed)  # type: ignore[arg-type]
    assert report.total("changed") > 60
    assert lt.verify(merged, base, adapter).is_equal
    assert lt.verify(merged, base, other).differs
    undone = lt.unmerge(merged, adapter, tmp_path / "back")
    assert undone.total("corrected") > 5  # of those that the update moved to another value
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    if scaled:
        lt.swap(merged, adapter, other, tmp_path / "swapped")
        lt.merge(base, other, tmp_path / "afresh", receipt=True)
        assert bytes_of(tmp_path / "swapped") == bytes_of(tmp_path / "afresh")
    (merged / "loratool_receipt.safetensors").unlink()
    nearest = lt.unmerge(merged, adapter, tmp_path / "nearest")
    doubtful = nearest.total("uncertain")
    wrong = (codes(base) != codes(tmp_path / "nearest")).sum()
    assert 0 < wrong <= doubtful


def codes(folder: Path) -> Tensor:
    return load_folder(folder)[f"{NAME}.weight"].view(torch.uint8)


def dora(folder: Path, factor: float = 1.0) -> Path:
    """One whose magnitudes are about the norms of the rows."""
    a, b = pair()
    made = save_peft(folder, {NAME: (a * factor, b)}, lora_alpha=2, use_dora=True)
    file = made / "adapter_model.safetensors"
    tensors = load_file(file)
    magnitudes = torch.linspace(0.3, 3, ROWS)
    save_file(tensors | {f"base_model.model.{NAME}.lora_magnitude_vector": magnitudes}, file)
    return made


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dora_goes_in_and_out(tmp_path: Path, dtype: torch.dtype) -> None:
    state = base_state("weight_scale_inv", GRID, dtype)
    base = save_folder(state, tmp_path / "base", BLOCKED)
    adapter, other = dora(tmp_path / "adapter"), dora(tmp_path / "other", 2.0)
    merged = tmp_path / "merged"
    report = lt.merge(base, adapter, merged, receipt=True)
    assert report.total("changed") > 100
    assert lt.verify(merged, base, adapter).is_equal
    assert lt.verify(merged, base, other).differs
    lt.unmerge(merged, adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    lt.swap(merged, adapter, other, tmp_path / "swapped")
    lt.merge(base, other, tmp_path / "afresh", receipt=True)
    assert bytes_of(tmp_path / "swapped") == bytes_of(tmp_path / "afresh")
    scales = spread(GRID, (BLOCK, BLOCK))
    a, b = pair()
    v = state[f"{NAME}.weight"].double() * scales + b.double() @ a.double()
    wanted = torch.linspace(0.3, 3, ROWS).double()[:, None] * v / v.norm(dim=1, keepdim=True)
    got = load_folder(merged)[f"{NAME}.weight"]
    step = torch.maximum(
        spacing(got.double().abs(), dtype), spacing((wanted / scales).abs(), dtype)
    )
    assert ((got.double() - wanted / scales).abs() <= 0.5000001 * step).all()
    lt.merge_in_place(base, adapter)
    (merged / "loratool_receipt.safetensors").unlink()
    assert bytes_of(base) == bytes_of(merged)


def test_scales_of_more_bits_than_are_exact(tmp_path: Path) -> None:
    base = save_folder(base_state("weight_scale_inv", GRID.double()), tmp_path / "base", BLOCKED)
    adapter = save_peft(tmp_path / "adapter", {NAME: pair()}, lora_alpha=2)
    with pytest.raises(UnsupportedInput, match="weight_scale_inv: is F64; scales are known in"):
        lt.merge(base, adapter, tmp_path / "out")
