"""Updates of experts in PEFT's own files: each matrix is what PEFT's wrapper makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

from loratool.formats import peft
from loratool.ops.sources import open_adapter
from tests.interop.families import EXPERT_FAMILIES

# PEFT looks for rank_pattern's keys among modules only; for parameters it says so and applies them
pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys", "ignore:.*is_gradient_checkpointing"
)

TARGETS = [
    ["experts.gate_up_proj", "experts.down_proj"],
    ["experts.down_proj"],
    ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"],
    ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "self_attn.o_proj.weight"],
]


def trained(folder: Path, targets: list[str]) -> dict[str, torch.Tensor]:
    """A PEFT adapter with random factors, and its changes by parameter."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"experts.down_proj": 7},
    )
    model = get_peft_model(EXPERT_FAMILIES["mixtral"].make(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    changes = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            owner = name.replace(".base_layer", "").removeprefix("base_model.model.")
            changes[f"{owner}.{module.parameter_name}"] = module.get_delta_weight("default")
    return changes


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_each_matrix_is_decoded(targets: list[str], tmp_path: Path) -> None:
    changes = trained(tmp_path, targets)
    updates = open_adapter(tmp_path).low_rank
    for name, change in changes.items():
        if change.ndim == 2:
            found = updates[name].load().dense()
        else:
            found = torch.stack([updates[f"{name}.{e}"].load().dense() for e in range(len(change))])
        torch.testing.assert_close(found.float(), change, rtol=1e-5, atol=1e-5)
    others = [name for name in updates if name.rstrip("0123456789").rstrip(".") not in changes]
    assert others == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


@pytest.mark.parametrize("targets", TARGETS[:3], ids=str)
def test_encoding_gives_back_the_file(targets: list[str], tmp_path: Path) -> None:
    trained(tmp_path, targets)
    adapter = open_adapter(tmp_path)
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    tensors, side_files = peft.encode(adapter, modules)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == set(stored)
    for key, value in stored.items():
        assert torch.equal(tensors[key].read(), value), key
        assert torch.equal(tensors[key].read_rows(1, 2), value[1:2]), key
    again = peft.decode("again", tensors, side_files)
    for name, update in adapter.low_rank.items():
        assert torch.equal(again.low_rank[name].load().dense(), update.load().dense()), name
