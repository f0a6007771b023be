"""Checkpoints that a LoRA was merged into, by loratool and by PEFT, are told from fine-tunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loratool as lt

RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def merged_by_peft_and_by_us(dtype: torch.dtype, folder: Path, size: float = 2e-3) -> list[Path]:
    """The base, and what both make of one adapter on it. size: of lora_B's entries."""
    base = model(dtype)
    base.save_pretrained(folder / "base")
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"])
    adapted = get_peft_model(base, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * size)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "peft")
    lt.merge(folder / "base", folder / "adapter", folder / "ours")
    return [folder / "base", folder / "peft", folder / "ours"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2e-3, 3e-2])
def test_a_merged_lora_is_one_of_its_rank(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    base, *merged = merged_by_peft_and_by_us(dtype, tmp_path, size)
    for tuned in merged:
        report = lt.extract(base, tuned, tmp_path / f"from {tuned.name}", rank=8)
        changed = [row for row in report.rows if row.rank]
        assert len(changed) == 3
        assert {row.lora_rank for row in changed} == {RANK}, tuned.name
        assert "a LoRA's of rank 4, to within rounding" in (report.lora_summary() or "")
        found = lt.extract(base, tuned, tmp_path / f"auto {tuned.name}", rank="auto")
        assert {row.rank for row in found.rows if row.rank} == {RANK}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_small_full_rank_tail_it_is_none(dtype: torch.dtype, tmp_path: Path) -> None:
    base, _, merged = merged_by_peft_and_by_us(dtype, tmp_path)
    tuned = LlamaForCausalLM.from_pretrained(merged, dtype=torch.float32)
    start = model(dtype).state_dict()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            change = float((value - start[name].float()).norm())
            if change:
                tail = torch.randn(value.shape, generator=generator)
                value.add_(tail, alpha=0.05 * change / float(tail.norm()))
    tuned.to(dtype).save_pretrained(tmp_path / "tailed")
    report = lt.extract(base, tmp_path / "tailed", tmp_path / "a", rank=8)
    changed = [row for row in report.rows if row.rank]
    assert len(changed) == 3
    assert {row.lora_rank for row in changed} == {None}
    assert all(row.lora_tail is not None and row.lora_tail < 0.05 for row in changed)
