"""LoRA on convolutions as PEFT saves it: kernels as matrices (out, in·k…), none grouped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, WhisperConfig, WhisperModel

import loratool as lt
from loratool.errors import ShapeMismatch, UnsupportedInput
from tests.builders import random_tensor, write_checkpoint, write_peft


def vit() -> nn.Module:
    """Conv2d with a kernel of 4×4 over 3 channels."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_attention_heads=2, **sizes)
    )


def whisper() -> nn.Module:
    """Two Conv1d with a kernel of 3, one of them with stride 2."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "vocab_size": 32}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return WhisperModel(WhisperConfig(**sizes, **heads, num_mel_bins=8, max_source_positions=6))


CASES = {"vit": (vit, ["projection"]), "whisper": (whisper, ["conv1", "conv2"])}


def adapted(model: nn.Module, targets: list[str], rank: int = 3) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("case", CASES)
def test_merged_exactly(case: str, tmp_path: Path) -> None:
    make, targets = CASES[case]
    make().save_pretrained(tmp_path / "base")
    model = adapted(type(make()).from_pretrained(tmp_path / "base"), targets)
    model.save_pretrained(tmp_path / "adapter")
    report = lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert len(report.rows) == len(targets)
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if name.endswith(tuple(targets))
    }
    assert len(layers) == len(targets)
    for name, value in merged.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(value, base[name])
            continue
        a = layer.lora_A["default"].weight.double().flatten(1)
        b = layer.lora_B["default"].weight.double().flatten(1)
        exact = base[name].double() + (5 / 3) * (b @ a).reshape(value.shape)
        assert torch.equal(value, exact.float()), "correctly rounded"
        theirs = base[name] + layer.get_delta_weight("default")
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_kernel_is_described_as_a_matrix(tmp_path: Path) -> None:
    update = lt.open_adapter(conv_adapter(tmp_path / "a", 3, 5, 5)).low_rank["conv.weight"]
    assert (update.shape, update.kernel, update.rank) == ((4, 75), (3, 5, 5), 2)
    assert update.load().shape == (4, 75)
    report = lt.inspect(tmp_path / "a")
    assert [row.shape for row in report.rows] == [(4, 75)]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, groups=4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    adapted(Grouped(), ["conv"], rank=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedInput, match="conv: is a grouped convolution"):
        lt.open_adapter(tmp_path / "adapter")


def conv_adapter(folder: Path, *kernel: int) -> Path:
    factors = {
        "base_model.model.conv.lora_A.weight": random_tensor(2, *kernel),
        "base_model.model.conv.lora_B.weight": random_tensor(4, 2, *(1 for _ in kernel[1:])),
    }
    return write_peft(folder, factors)


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ((3, 5, 5), ShapeMismatch, r"conv.weight: the update has shape \[4, 3, 5, 5\]"),
        ((6, 3, 3), UnsupportedInput, "conv.weight: is a grouped convolution"),
        ((27,), ShapeMismatch, "conv.weight: the update has shape"),
        ((1, 3, 9), ShapeMismatch, "conv.weight: the update has shape"),
    ],
)
def test_kernels_must_agree(
    kernel: tuple[int, ...], error: type[lt.LoratoolError], message: str, tmp_path: Path
) -> None:
    """Even where in·k… is the same number."""
    base = write_checkpoint(tmp_path / "base", {"conv.weight": random_tensor(4, 3, 3, 3)})
    adapter = conv_adapter(tmp_path / "adapter", *kernel)
    with pytest.raises(error, match=message):
        lt.merge(base, adapter, tmp_path / "merged")
