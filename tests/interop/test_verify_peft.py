"""verify on what PEFT's own merge_and_unload writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import loratool as lt
from loratool.ops.verify_report import EXACT, ROUNDED
from loratool.ops.verify_row import Cause, Order, Status
from tests.interop.conftest import llama
from tests.interop.families import EXPERT_FAMILIES
from tests.interop.test_peft_experts import TARGETS, trained
from tests.interop.test_peft_kinds import KINDS, randomised

# PEFT asks transformers by a name that is on its way out
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing",
    "ignore:Setting `save_embedding_layers`",
    "ignore:.*tie_word_embeddings",
    "ignore:`lora_bias=True` was passed",
    "ignore:.* LoRA tensor.* have invalid shape",
    "ignore:.*no longer tied",
    "ignore:The following (rank|alpha)_pattern keys",
)


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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kasa"])
def test_a_merge_in_float32(kind: str, tmp_path: Path) -> None:
    """Sums of products miss by more than the last place where they cancel; that is rounding too.
    One wrong value beyond that is not."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    make, config = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(base)
    randomised(model, config).save_pretrained(adapter)
    onto = type(model).from_pretrained(base)
    PeftModel.from_pretrained(onto, str(adapter)).merge_and_unload().save_pretrained(merged)
    report = lt.verify(merged, base, adapter)
    assert report.verdict in (EXACT, ROUNDED)

    file = merged / "model.safetensors"
    state = load_file(file)
    name = report.updated[0].name
    state[name].reshape(-1)[5] += 1e-4 * state[name].abs().max()
    save_file(state, file, {"format": "pt"})
    (row,) = (row for row in lt.verify(merged, base, adapter).rows if row.name == name)
    assert (row.status, row.cause) in ((Status.OFF, Cause.VALUES), (Status.OFF, Cause.OTHER))


def test_experts_merged_in_float32(tmp_path: Path) -> None:
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    torch.manual_seed(0)
    model = EXPERT_FAMILIES["mixtral"].make()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    changes = trained(adapter, TARGETS[1])
    for folder in (base, merged):
        folder.mkdir()
        model.config.save_pretrained(folder)
    save_file(state, base / "model.safetensors", {"format": "pt"})
    lt.merge(base, adapter, tmp_path / "right")
    right = load_file(tmp_path / "right" / "model.safetensors")
    summed = {name: state[name] + change.detach() for name, change in changes.items()}
    assert all(one.ndim == 3 and not torch.equal(one, right[n]) for n, one in summed.items())
    save_file(right | summed, merged / "model.safetensors", {"format": "pt"})
    report = lt.verify(merged, base, adapter)
    assert report.verdict == ROUNDED


def test_one_adapter_cannot_be_missing_beside_others(made: Path) -> None:
    """A factor close to 1 that is not 1: there is only one adapter, so none of several is amiss."""
    lt.merge(made / "base", [(made / "adapter", 1.015)], made / "off", dtype="float32")
    report = lt.verify(made / "off", made / "base", made / "adapter")
    assert {row.cause for row in report.updated} == {Cause.SCALE}


@pytest.mark.parametrize("autocast", [True, False])
def test_two_adapters_one_after_the_other(made: Path, autocast: bool) -> None:
    """PEFT rounds between them."""
    torch.manual_seed(6)
    second = made / "second"
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(made / "base"),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(second)
    base = LlamaForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16)
    settings = {"autocast_adapter_dtype": autocast}
    first = PeftModel.from_pretrained(base, str(made / "adapter"), "first", **settings)
    first.load_adapter(str(second), "second", **settings)
    first.merge_and_unload(adapter_names=["first", "second"]).save_pretrained(made / "merged")
    report = lt.verify(made / "merged", made / "base", [made / "adapter", second])
    assert report.verdict == ROUNDED
    expected = Order.STEPS if autocast else Order.STEPS_ALL
    rows = [row for row in report.rows if "q_proj" in row.name]
    assert {row.order for row in rows} == {expected}
