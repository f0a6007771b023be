"""Experts by matrix, however they are stored, and what PEFT takes for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.errors import DisagreementError
from loratool.layouts.config import ModelConfig
from loratool.layouts.experts import by_expert, find_experts, has_stacked
from loratool.storage.tensors import MemoryTensor
from loratool.storage.views import Stored, rows_of

QWEN = ModelConfig({"model_type": "qwen3_moe"})
MIXTRAL = ModelConfig({"model_type": "mixtral"})
MLP = "model.layers.0.mlp"
NAMES = [
    f"{MLP}.gate.weight",
    f"{MLP}.experts.gate_up_proj.0",
    f"{MLP}.experts.down_proj.11",
    f"{MLP}.shared_expert.gate_proj.weight",
    f"{MLP}.shared_expert_gate.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.self_attn.q_proj.weight",
]


def stored(values: dict[str, Tensor]) -> dict[str, Stored]:
    return {name: rows_of(MemoryTensor(value), 0, len(value)) for name, value in values.items()}


@pytest.mark.parametrize(
    ("name", "router", "retargeted"),
    [
        (NAMES[0], True, False),
        (NAMES[1], False, False),
        (NAMES[2], False, False),
        (NAMES[3], False, True),
        (NAMES[4], False, False),
        (NAMES[5], False, True),
        (NAMES[6], False, False),  # no experts beside it
        (NAMES[7], False, False),
    ],
)
def test_what_peft_takes_for_a_router_or_an_expert(
    name: str, router: bool, retargeted: bool
) -> None:
    experts = find_experts(NAMES, QWEN, stacked=False)
    assert experts.is_router(name) is router
    assert experts.is_retargeted(name) is retargeted


def test_a_model_without_experts() -> None:
    names = [name for name in NAMES if ".experts." not in name]
    experts = find_experts(names, QWEN, stacked=False)
    assert not any(experts.is_router(name) or experts.is_retargeted(name) for name in names)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.permutations([0, 1, 2]))
def test_separate_and_stacked_experts_are_the_same_matrices(count: int, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(count)
    gate_up = torch.randn(count, 6, 4, generator=generator)
    down = torch.randn(count, 4, 3, generator=generator)
    separate = {}
    for e in range(count):
        parts = {"w1": gate_up[e, :3], "w3": gate_up[e, 3:], "w2": down[e]}
        for part in (sorted(parts)[i] for i in order):
            separate[f"m.experts.{e}.{part}.weight"] = parts[part]
    stacked = {"m.experts.gate_up_proj": gate_up, "m.experts.down_proj": down}
    one = by_expert(stored(separate), MIXTRAL)
    two = by_expert(stored(stacked), MIXTRAL)
    assert set(one) == set(two)
    assert len(one) == 2 * count
    for name, tensor in one.items():
        assert torch.equal(tensor.read(), two[name].read()), name
    assert has_stacked(stored(stacked))
    assert not has_stacked(stored(separate))


def test_experts_that_are_modules_of_their_own_stay_so() -> None:
    """Architectures that transformers does not stack are adapted as ordinary layers."""
    tensors = stored({f"m.experts.{e}.w1.weight": torch.zeros(2, 2) for e in range(2)})
    assert by_expert(tensors, ModelConfig({"model_type": "of_its_own"})) == tensors


def test_a_missing_part_is_named() -> None:
    names = ("0.w1", "0.w2", "0.w3", "2.w1", "2.w2", "2.w3")
    tensors = stored({f"m.experts.{name}.weight": torch.zeros(2, 2) for name in names})
    with pytest.raises(DisagreementError, match=r"m\.experts: expert 1 has no down_proj, gate"):
        by_expert(tensors, MIXTRAL)
