"""Which parameters of a mixture of experts PEFT cannot adapt under transformers 5."""

from __future__ import annotations

import pytest

from loratool.layouts.experts import find_experts

NAMES = [
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight",
    "model.layers.0.mlp.experts.11.down_proj.weight",
    "model.layers.0.mlp.shared_expert.gate_proj.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.self_attn.q_proj.weight",
]


@pytest.mark.parametrize(
    ("name", "expert", "whole"),
    [
        (NAMES[0], False, True),  # a router
        (NAMES[1], True, True),
        (NAMES[2], True, True),
        (NAMES[3], False, True),  # PEFT takes it for an expert's
        (NAMES[4], False, False),
        (NAMES[5], False, True),
        (NAMES[6], False, False),  # no experts beside it
        (NAMES[7], False, False),
    ],
)
def test_experts(name: str, expert: bool, whole: bool) -> None:
    experts = find_experts(NAMES)
    assert experts.is_expert(name) is expert
    assert experts.is_saved_whole(name) is whole


def test_a_model_without_experts() -> None:
    experts = find_experts(name for name in NAMES if ".experts." not in name)
    assert not any(experts.is_expert(name) for name in NAMES if ".experts." not in name)
    assert not any(experts.is_saved_whole(name) for name in NAMES)
