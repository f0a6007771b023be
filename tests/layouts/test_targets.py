"""--targets by role, by short name, by expression."""

from __future__ import annotations

import pytest

from loratool.adapter import ModuleKind
from loratool.errors import NothingMatches, UsageError
from loratool.layouts.targets import targeted

LINEAR, NORM = ModuleKind.LINEAR, ModuleKind.NORM
KINDS = {
    "model.layers.0.self_attn.q_proj.weight": LINEAR,
    "model.layers.0.self_attn.v_proj.weight": LINEAR,
    "model.layers.0.mlp.gate_proj.weight": LINEAR,
    "model.layers.0.input_layernorm.weight": NORM,
    "encoder.layer.0.attention.output.dense.weight": LINEAR,
    "encoder.layer.0.intermediate.dense.weight": LINEAR,
    "encoder.layer.0.output.dense.weight": LINEAR,
    "transformer.h.0.attn.c_proj.weight": ModuleKind.CONV1D,
    "transformer.h.0.mlp.c_proj.weight": ModuleKind.CONV1D,
    "lm_head.weight": LINEAR,
    "conv_in.weight": ModuleKind.CONV,
}


def short(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[-3:-1]) for name in names}


def test_roles() -> None:
    assert short(targeted("attention", KINDS)) == {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "output.dense",
        "attn.c_proj",
    }
    assert "encoder.layer.0.output.dense.weight" not in targeted("attention", KINDS)
    assert short(targeted("mlp", KINDS)) == {
        "mlp.gate_proj",
        "intermediate.dense",
        "output.dense",
        "mlp.c_proj",
    }
    everything = targeted("all-linear", KINDS)
    assert "lm_head.weight" not in everything
    assert len(everything) == 8
    assert targeted("all-conv", KINDS) == {"conv_in.weight"}
    assert targeted("all-linear, all-conv", KINDS) == everything | {"conv_in.weight"}


def test_experts_are_linear_layers_of_the_mlp() -> None:
    """They are most of a mixture: --targets mlp must not mean its router alone."""
    block = "model.layers.0.mlp"
    experts = {
        f"{block}.experts.{part}.{i}" for part in ("gate_up_proj", "down_proj") for i in (0, 1)
    }
    kinds = {f"{block}.gate.weight": LINEAR, **dict.fromkeys(experts, ModuleKind.EXPERT)}
    attention = {"model.layers.0.self_attn.q_proj.weight": LINEAR}
    for role in ("mlp", "all-linear"):
        assert experts < targeted(role, kinds | attention)
    assert targeted("attention", kinds | attention) == set(attention)


def test_names_and_expressions() -> None:
    assert short(targeted("q,v", KINDS)) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert short(targeted("gate_proj, lm_head", KINDS)) == {"mlp.gate_proj", "lm_head"}
    assert short(targeted(r".*\.(q|v)_proj", KINDS)) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert short(targeted(r".*[qv]_proj", KINDS)) == {"self_attn.q_proj", "self_attn.v_proj"}


def test_what_matches_nothing_is_an_error() -> None:
    for text in ("q,k", "nothing", r".*\.x_(a|b)"):
        with pytest.raises(NothingMatches, match="matches nothing"):
            targeted(text, KINDS)
    with pytest.raises(UsageError, match="not a regular expression"):
        targeted("(q", KINDS)
