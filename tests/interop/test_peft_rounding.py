"""How often PEFT's merge in bf16 is not the nearest value: the shares that docs/kinds.md states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loratool as lt

SHARES = [(0.003, 0.005), (0.03, 0.03), (0.1, 0.08), (0.3, 0.17)]


@pytest.mark.parametrize(("size", "share"), SHARES)
def test_shares(size: float, share: float, tmp_path: Path) -> None:
    """size: ‖ΔW‖/‖W0‖."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("layer", nn.Linear(512, 512, bias=False, dtype=torch.bfloat16))
    weight = net.layer.weight.detach().clone()
    save_file({"layer.weight": weight}, tmp_path / "base.safetensors")
    adapted = get_peft_model(
        net,
        LoraConfig(r=8, lora_alpha=16, target_modules=["layer"]),
        autocast_adapter_dtype=False,
    )
    a, b = torch.randn(8, 512), torch.randn(512, 8)
    times = (size * weight.float().norm() / (2 * b @ a).norm()).sqrt()
    layer = adapted.base_model.model.layer
    layer.lora_A.default.weight.data = (a * times).bfloat16()
    layer.lora_B.default.weight.data = (b * times).bfloat16()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload().layer.weight
    lt.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")["layer.weight"]
    assert float((merged != ours).float().mean()) == pytest.approx(share, rel=0.1)
