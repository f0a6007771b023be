"""What loratool refuses to merge, since PEFT's own computation has no place in the base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import loratool as lt
from loratool.errors import UnsupportedInput
from tests.interop.conftest import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 6, 3, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.grouped(x)
        return out


def test_a_grouped_convolutions_update_crosses_its_groups(tmp_path: Path) -> None:
    """Its first outputs depend on channels that the weight of its first group does not have."""
    torch.manual_seed(0)
    base = Grouped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(**LORA, target_modules=["grouped"]))
    x = torch.randn(1, 8, 5, 5)
    other = x.clone()
    other[:, 4:] += 1  # channels of the second group
    layer = adapted.base_model.model.grouped
    assert torch.equal(layer.base_layer(x)[:, :3], layer.base_layer(other)[:, :3])
    assert (adapted(x) - adapted(other))[:, :3].abs().min() > 1e-3
    with pytest.raises(NotImplementedError, match="groups > 1"):
        adapted.merge_and_unload()
    adapted.save_pretrained(tmp_path / "adapter")
    save_file({"grouped.weight": layer.base_layer.weight.detach()}, tmp_path / "base.safetensors")
    with pytest.raises(UnsupportedInput, match="mixes channels of all groups") as refused:
        lt.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "m.safetensors")
    assert "LoHa or LoKr" in (refused.value.hint or "")


def test_replicated_layers_are_merged_into_the_written_out_model(tmp_path: Path) -> None:
    """The remedy that the refusal names gives what PEFT computes, which its merge does not."""
    torch.manual_seed(0)
    first = llama()
    first.save_pretrained(tmp_path / "base")
    layers = [0, 1, 1]
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(**LORA, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedInput, match="layer_replication") as refused:
        lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "m")
    assert "take layer_replication out of adapter_config.json" in (refused.value.hint or "")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    expanded = {name: value for name, value in weights.items() if ".layers." not in name}
    for index, layer in enumerate(layers):
        start = f"model.layers.{layer}."
        for name in [name for name in weights if name.startswith(start)]:
            new = f"model.layers.{index}.{name.removeprefix(start)}"
            expanded[new] = weights[name].clone()
    big = tmp_path / "big"
    big.mkdir()
    save_file(expanded, big / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["num_hidden_layers"] = len(layers)
    config.pop("layer_types", None)
    (big / "config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings["layer_replication"]
    path.write_text(json.dumps(settings))
    report = lt.merge(big, tmp_path / "adapter", tmp_path / "merged")
    assert len(report.rows) == 3
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.tensor([[1, 5, 9, 3]])
    wanted = adapted(input_ids=tokens).logits
    torch.testing.assert_close(merged(input_ids=tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    doubled = adapted.merge_and_unload()(input_ids=tokens).logits
    assert (doubled - wanted).abs().max() > 1e-3


def test_an_adapter_that_updates_nothing_is_said_to_be_none_of_pefts(tmp_path: Path) -> None:
    """Values stored whole alone: loratool merges them, PEFT finds nothing to target."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    report = lt.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter")
    assert any("PEFT loads no such adapter" in note for note in report.notes)
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    files = (tmp_path / folder / "model.safetensors" for folder in ("merged", "tuned"))
    merged, tuned = (load_file(file) for file in files)
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)
