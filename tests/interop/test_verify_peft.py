"""verify on what PEFT's own merge_and_unload writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import loratool as lt
from loratool.ops.verify_report import EXACT, ROUNDED
from loratool.ops.verify_row import Cause, Order
from tests.interop.conftest import llama

# PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base/ and adapter/ (float32 factors, with random B), both by the libraries."""
    torch.manual_seed(5)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def merged_by_peft(folder: Path, *, autocast: bool = True) -> Path:
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(
        base, str(folder / "adapter"), autocast_adapter_dtype=autocast
    )
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "merged"


def test_a_bf16_merge_with_float32_factors(made: Path) -> None:
    report = lt.verify(merged_by_peft(made), made / "base", made / "adapter")
    assert report.verdict in (EXACT, ROUNDED)
    assert {row.order for row in report.updated} <= {None, Order.FLOAT32}
    assert len(report.updated) == 6


def test_a_bf16_merge_with_factors_in_bf16(made: Path) -> None:
    """PEFT then rounds the factors, the product and the sum."""
    report = lt.verify(merged_by_peft(made, autocast=False), made / "base", made / "adapter")
    assert report.verdict == ROUNDED
    assert {row.order for row in report.updated} == {Order.ALL}


def test_a_merge_that_never_happened(made: Path) -> None:
    """Adapter keys that name no module: PEFT loads and merges nothing."""
    report = lt.verify(made / "base", made / "base", made / "adapter")
    assert {row.cause for row in report.updated} == {Cause.NOT_APPLIED}
