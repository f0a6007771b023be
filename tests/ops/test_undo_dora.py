"""DoRA undone through the norms of its lines: exact, and about as cheap as a plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.receipt import RECEIPT_FILE, read_receipt
from tests.ops.builders import GPT2, LLAMA, save_folder, save_peft
from tests.ops.test_unmerge import bytes_of

LINEAR, CONV1D = "model.layers.0.self_attn.q_proj", "h.0.attn.c_attn"


def dora(folder: Path, module: str, w0: torch.Tensor, *, by_column: bool) -> Path:
    """An adapter whose magnitudes are within a few per cent of the base's own norms."""
    torch.manual_seed(4)
    out, into = w0.shape[::-1] if by_column else w0.shape
    a, b = torch.randn(4, into) * 0.02, torch.randn(out, 4) * 0.02
    path = save_peft(folder, {module: (a, b)}, use_dora=True, fan_in_fan_out=by_column)
    tensors = load_file(path / "adapter_model.safetensors")
    norms = w0.float().norm(dim=0 if by_column else 1)
    key = f"base_model.model.{module}.lora_magnitude_vector"
    tensors[key] = norms * (1 + 0.03 * torch.randn(out))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("by_column", [False, True], ids=["rows", "columns"])
def test_few_weights_are_missed(
    dtype: torch.dtype, weight: float, by_column: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    w0 = (torch.randn(96, 64) * 0.05).to(dtype)
    module, config = (CONV1D, GPT2) if by_column else (LINEAR, LLAMA)
    base = save_folder({f"{module}.weight": w0}, tmp_path / "base", config)
    adapter = dora(tmp_path / "adapter", module, w0, by_column=by_column)
    lt.merge(base, [(adapter, weight)], tmp_path / "merged", receipt=True)
    record = read_receipt(tmp_path / "merged" / RECEIPT_FILE).tensors[f"{module}.weight"]
    assert record.method == "lines"
    assert record.misses < 0.25 * w0.numel()
    lt.unmerge(tmp_path / "merged", [(adapter, weight)], tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)


def test_a_weight_that_cancels_the_base(tmp_path: Path) -> None:
    """Where 1 − w + w·m/‖V‖ is next to nothing, the merged values say little of the base; it comes
    back all the same."""
    w0 = torch.eye(8)
    base = save_folder({f"{LINEAR}.weight": w0}, tmp_path / "base", LLAMA)
    adapter = dora(tmp_path / "adapter", LINEAR, w0, by_column=False)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        tensors[name] = torch.zeros_like(tensors[name])  # no change, magnitude 0, weight 1
    save_file(tensors, path)
    lt.merge(base, adapter, tmp_path / "merged", receipt=True)
    assert not load_file(tmp_path / "merged" / "model.safetensors")[f"{LINEAR}.weight"].any()
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
