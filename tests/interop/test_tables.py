"""Tables, norms and convolutions that look like something else: stored as PEFT's modules are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from diffusers import DiTTransformer2DModel
from peft import PeftModel
from torch import nn

import loratool as lt

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
_PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
_LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def _dit() -> nn.Module:
    """Tables of classes, one in each block."""
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return model


def _convnext() -> nn.Module:
    """A norm with weights of four dimensions."""
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return tf.ConvNextV2ForImageClassification(
        tf.ConvNextV2Config(**sizes, patch_size=4, image_size=32, num_labels=3)
    )


def _dpt() -> nn.Module:
    """Transposed convolutions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    fusing = {"neck_hidden_sizes": [4, 8, 16, 16], "fusion_hidden_size": 16}
    return tf.DPTForDepthEstimation(
        tf.DPTConfig(
            **sizes,
            **fusing,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            backbone_out_indices=[0, 1, 2, 3],
        )
    )


def _sam() -> nn.Module:
    """Tokens in tables, transposed convolutions, an embedding in two places."""
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    masks = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    eyes = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "mlp_dim": 48}
    eyes |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "window_size": 2}
    return tf.SamModel(
        tf.SamConfig(
            vision_config=eyes | {"global_attn_indexes": [1], "num_pos_feats": 8},
            prompt_encoder_config=prompts,
            mask_decoder_config=masks | {"iou_head_hidden_dim": 16},
        )
    )


def _masks(model: nn.Module) -> torch.Tensor:
    points = torch.tensor([[[[8.0, 8.0]]], [[[3.0, 5.0]]]])
    output: torch.Tensor = model(pixel_values=_PIXELS, input_points=points).pred_masks
    return output


def _classes(model: nn.Module) -> torch.Tensor:
    step, label = torch.tensor([3]), torch.tensor([2])
    output: torch.Tensor = model(_LATENTS, timestep=step, class_labels=label).sample
    return output


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]] = {
    "dit": (_dit, _classes),
    "convnext": (_convnext, lambda model: model(pixel_values=_PIXELS).logits),
    "sam": (_sam, _masks),
    "dpt": (_dpt, lambda model: model(pixel_values=_PIXELS).predicted_depth),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_module_is_what_peft_takes_it_for(name: str, tmp_path: Path) -> None:
    make, run = MODELS[name]
    torch.manual_seed(3)
    model = make().eval()
    for side in ("base", "tuned"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / side)
    with torch.no_grad():
        wanted = run(model)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    whole = {"vision_encoder": "whole"} if name == "sam" else {}  # it has bare parameters
    lt.extract(base, tmp_path / "tuned", adapter, rank="full", conv_rank="full", rank_for=whole)
    peft = PeftModel.from_pretrained(type(model).from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(peft), wanted, rtol=1e-4, atol=2e-5)
