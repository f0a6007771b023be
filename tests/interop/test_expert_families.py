"""Mixtures of experts with every parameter changed: PEFT gives the tuned model back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import loratool as lt
from loratool.errors import Unplaced
from tests.interop.families import EXPERT_FAMILIES, Family
from tests.interop.test_families import answer, load, save_pair, under_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys",  # said of parameters, and applied to them
    "ignore:.*is_gradient_checkpointing",
)


@pytest.mark.parametrize("rank", ["3", "full"])
@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_peft_merged_and_tuned_agree(name: str, rank: str, tmp_path: Path) -> None:
    family = EXPERT_FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank=rank)
    assert any(row.kind == "expert" for row in report.rows)
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    merged = answer(family, load(family, tmp_path / "merged"))
    torch.testing.assert_close(peft, merged, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(answer(family, load(family, base)), merged, rtol=0.02, atol=0.02)
    if rank == "full":
        wanted = answer(family, load(family, tuned))
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=2e-5)


def _qwen3_vl_moe() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    eyes |= {"out_hidden_size": 32, "num_position_embeddings": 16}
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(
            vision_config=eyes | {"deepstack_visual_indexes": [0]},
            text_config=sizes | heads | experts | {"rope_parameters": rope},
        )
    )


@pytest.mark.parametrize("turned", [(), ("base",), ("tuned",), ("base", "tuned")])
def test_stacks_of_either_orientation(turned: tuple[str, ...], tmp_path: Path) -> None:
    """Files of Qwen3-VL-MoE have (in, out) from transformers 4 and (out, in) from 5."""
    family = Family(_qwen3_vl_moe, lambda: {"input_ids": torch.arange(2, 26).reshape(2, 12)})
    base, tuned = save_pair(family, tmp_path)
    for side in turned:
        state = load_file(tmp_path / side / "model.safetensors")
        for name in [name for name in state if ".experts." in name]:
            state[name] = state[name].transpose(1, 2).contiguous()
        save_file(state, tmp_path / side / "model.safetensors", {"format": "pt"})
    lt.extract(base, tuned, tmp_path / "adapter", rank="full")
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = answer(family, load(family, tuned))
    for model in (
        under_peft(family, base, tmp_path / "adapter"),
        load(family, tmp_path / "merged"),
    ):
        torch.testing.assert_close(answer(family, model), wanted, rtol=1e-4, atol=2e-5)


def test_experts_of_unequal_rank_are_padded(tmp_path: Path) -> None:
    """One expert unchanged, one excluded, the others of the ranks that a rule gives them."""
    family = EXPERT_FAMILIES["mixtral"]
    base, tuned = save_pair(family, tmp_path)
    before, after = (load_file(side / "model.safetensors") for side in (base, tuned))
    expert = "model.layers.0.block_sparse_moe.experts.2."
    after |= {name: value for name, value in before.items() if name.startswith(expert)}
    save_file(after, tuned / "model.safetensors", {"format": "pt"})
    report = lt.extract(
        base,
        tuned,
        tmp_path / "adapter",
        rank="full",
        rank_for={"experts.down_proj.1": 5},
        exclude=["model.layers.1.mlp.experts.gate_up_proj.3"],
    )
    rows = {row.name: row for row in report.rows}
    assert rows["model.layers.0.mlp.experts.gate_up_proj.2"].status == "unchanged"
    assert rows["model.layers.1.mlp.experts.down_proj.1"].rank == 5
    after["model.layers.1.block_sparse_moe.experts.3.w1.weight"] = before[
        "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    ]
    after["model.layers.1.block_sparse_moe.experts.3.w3.weight"] = before[
        "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    ]
    for layer in (0, 1):
        update = lt.open_adapter(tmp_path / "adapter").low_rank[
            f"model.layers.{layer}.mlp.experts.down_proj.1"
        ]
        name = f"model.layers.{layer}.block_sparse_moe.experts.1.w2.weight"
        after[name] = before[name] + update.load().dense().float()
    save_file(after, tuned / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(
        answer(family, under_peft(family, base, tmp_path / "adapter")),
        answer(family, load(family, tuned)),
        rtol=1e-4,
        atol=2e-5,
    )


def test_servers_get_no_experts(tmp_path: Path) -> None:
    base, tuned = save_pair(EXPERT_FAMILIES["qwen2-moe"], tmp_path)
    apart = ["embed_tokens", "lm_head"]
    with pytest.raises(Unplaced) as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=2, profile="vllm", drop_rest=True)
    assert any("an update of an expert" in detail for detail in caught.value.details)
    lt.extract(
        base,
        tuned,
        tmp_path / "a",
        rank=2,
        profile="vllm",
        drop_rest=True,
        exclude=["*.experts.*", *apart],
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "target_parameters" not in config
    assert any(
        "shared_expert.gate_proj" in name for name in lt.open_adapter(tmp_path / "a").updates
    )
