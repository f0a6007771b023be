"""Convolutions for which PEFT's forward pass is not what PEFT merges: docs/kinds.md names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loratool as lt

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["conv"], "init_lora_weights": False}
LYCORIS = {"r": 2, "alpha": 4, "target_modules": ["conv"], "init_weights": False}
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "loha": LoHaConfig(**LYCORIS),
    "lokr": LoKrConfig(**LYCORIS),
}
DILATED = {"dilation": 2, "padding": "same"}
AGREE = {"plain": {}, "stride": {"stride": 2}, "padding": {"padding": 1}}
DISAGREE = {
    "reflected": ({"padding": 1, "padding_mode": "reflect"}, set(KINDS)),
    "replicated": ({"padding": 1, "padding_mode": "replicate"}, set(KINDS)),
    "circular": ({"padding": 1, "padding_mode": "circular"}, set(KINDS)),
    "dilated": (DILATED, {"lora", "dora"}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
CONVOLUTIONS = [nn.Conv1d, nn.Conv2d]


def disagreement(net: nn.Module, kind: str, folder: Path) -> float:
    """‖forward − merged‖ of what the adapter adds to the output, by PEFT alone; and loratool must
    merge what PEFT merges."""
    save_file(net.state_dict(), folder / "base.safetensors")
    x = torch.randn(1, 4, *[9] * (net.conv.weight.ndim - 2))
    before = net(x)
    adapted = get_peft_model(net, KINDS[kind]).eval()
    adapted.save_pretrained(folder / "adapter")
    trained = adapted(x)
    merged = adapted.merge_and_unload()
    lt.merge(folder / "base.safetensors", folder / "adapter", folder / "ours.safetensors")
    ours = load_file(folder / "ours.safetensors")
    torch.testing.assert_close(ours, dict(merged.state_dict()), rtol=1e-5, atol=1e-5)
    return float((trained - merged(x)).norm() / (trained - before).norm())


def net_of(convolution: type[nn.Module], **settings: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("conv", convolution(4, 6, 3, **settings))
    return net


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", AGREE)
def test_where_they_agree(
    case: str, kind: str, convolution: type[nn.Module], tmp_path: Path
) -> None:
    assert disagreement(net_of(convolution, **AGREE[case]), kind, tmp_path) < 1e-4


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DISAGREE)
def test_where_they_do_not(
    case: str, kind: str, convolution: type[nn.Module], tmp_path: Path
) -> None:
    settings, kinds = DISAGREE[case]
    found = disagreement(net_of(convolution, **settings), kind, tmp_path)
    assert found > 0.2 if kind in kinds else found < 1e-4
    if case == "dilated" and kind in kinds:
        assert found > 1


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_dilated_one_that_changes_the_size(kind: str) -> None:
    adapted = get_peft_model(net_of(nn.Conv2d, dilation=2), KINDS[kind])
    with pytest.raises(RuntimeError, match="must match"):
        adapted(torch.randn(1, 4, 9, 9))
