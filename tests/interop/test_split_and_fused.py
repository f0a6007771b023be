"""Adapters that name projections apart which the base stores fused, and the other way round.

What a row of a fused tensor means is asked of transformers' own code, not of loratool's table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import loratool as lt
from loratool.errors import DisagreementError, NothingMatches, ShapeMismatch
from tests.algebra.reference import exact_merge, same_bits
from tests.interop.conftest import qwen2
from tests.interop.test_peft_kinds import randomised
from tests.ops.builders import load_folder, save_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing",
    "ignore:.*tie_word_embeddings",
    "ignore:.* LoRA tensor.* have invalid shape",
)

SIZES = {"vocab_size": 32, "hidden_size": 24, "num_attention_heads": 6}
HEADS = {"num_hidden_layers": 1, "intermediate_size": 40, "bos_token_id": 0, "eos_token_id": 0}
Rows = Callable[[PreTrainedModel, Tensor], list[Tensor]]


def attention(model: PreTrainedModel) -> torch.nn.Module:
    return next(
        m for n, m in model.named_modules() if n.endswith((".attn", "attention", "self_attn"))
    )


def by_split_heads(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    """Falcon; its grouped form repeats keys and values, whose first appearance counts."""
    return [part.flatten().unique() for part in attention(model)._split_heads(rows[None, None])]


def by_reshape(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    return [part.flatten() for part in attention(model)._reshape(rows[None, None])]


def by_chunks_of_heads(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    """GPTNeoXAttention.forward: view as heads of 3·size, transposed, chunked."""
    qkv = rows.view(1, 1, -1, 3 * attention(model).head_size).transpose(1, 2)
    return [part.flatten() for part in qkv.chunk(3, dim=-1)]


def by_sizes(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    """Phi-3: queries, then keys, then values."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    counts = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    return list(rows.split([count * size for count in counts]))


def by_thirds(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    return list(rows.split(attention(model).split_size))


def by_bigcode(model: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    ours = attention(model)
    if ours.multi_query:
        return list(rows.split((ours.embed_dim, ours.kv_dim, ours.kv_dim)))
    heads = rows.view(ours.num_heads, 3 * ours.head_dim)
    return [part.flatten() for part in heads.split(3 * [ours.head_dim], dim=1)]


FUSED: dict[str, tuple[AutoConfig, str, Rows]] = {
    "phi3": (
        Phi3Config(**SIZES, **HEADS, num_key_value_heads=2, pad_token_id=0),
        "qkv_proj",
        by_sizes,
    ),
    "gpt_neox": (GPTNeoXConfig(**SIZES, **HEADS), "query_key_value", by_chunks_of_heads),
    "bloom": (
        BloomConfig(vocab_size=32, hidden_size=24, n_head=6, n_layer=1),
        "query_key_value",
        by_reshape,
    ),
    "falcon": (
        FalconConfig(**SIZES, num_hidden_layers=1, new_decoder_architecture=True, num_kv_heads=2),
        "query_key_value",
        by_split_heads,
    ),
    "falcon multi-query": (
        FalconConfig(**SIZES, num_hidden_layers=1, multi_query=True),
        "query_key_value",
        by_split_heads,
    ),
    "falcon of old": (
        FalconConfig(**SIZES, num_hidden_layers=1, multi_query=False),
        "query_key_value",
        by_split_heads,
    ),
    "gpt2": (GPT2Config(vocab_size=32, n_embd=24, n_head=6, n_layer=1), "c_attn", by_thirds),
    "gpt_bigcode": (
        GPTBigCodeConfig(vocab_size=32, n_embd=24, n_head=6, n_layer=1),
        "c_attn",
        by_bigcode,
    ),
    "gpt_bigcode of many keys": (
        GPTBigCodeConfig(vocab_size=32, n_embd=24, n_head=6, n_layer=1, multi_query=False),
        "c_attn",
        by_bigcode,
    ),
}


def factors(out: int, into: int, seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, into, generator=generator) * 0.3
    return a, torch.randn(out, rank, generator=generator) * 0.3


@pytest.mark.parametrize("kind", FUSED)
def test_parts_of_a_fused_projection(kind: str, tmp_path: Path) -> None:
    config, fused, rows_of = FUSED[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    base = load_folder(tmp_path / "base")
    name = next(n for n in base if n.endswith(f"{fused}.weight"))
    turned = kind == "gpt2"
    weight = base[name].T if turned else base[name]
    parent = name.removesuffix(f".{fused}.weight")
    parts = rows_of(model, torch.arange(len(weight)))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(weight)))
    chosen = {}
    b_full = []
    for index, (part, rows) in enumerate(
        zip(("q_proj", "v_proj"), (parts[0], parts[2]), strict=True)
    ):
        a, b = factors(len(rows), weight.shape[1], index)
        chosen[f"{parent}.{part}"] = (a, b)
        spread = torch.zeros(len(weight), 2)
        spread[rows] = b
        b_full.append((spread, a, 2.0))
    adapter = save_peft(tmp_path / "adapter", chosen, lora_alpha=4)
    report = lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")[name]
    merged = merged.T.contiguous() if turned else merged
    assert same_bits(merged, exact_merge(weight, b_full, torch.float32))
    assert any(f"q_proj was read as a part of {fused}" in note for note in report.facts["notes"])
    assert [row.name for row in report.rows] == [name]


def test_halves_of_gate_and_up(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(FUSED["phi3"][0])
    model.save_pretrained(tmp_path / "base")
    base = load_folder(tmp_path / "base")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    a, b = factors(40, 24, 5)
    adapter = save_peft(tmp_path / "adapter", {"model.layers.0.mlp.up_proj": (a, b)}, lora_alpha=4)
    lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    expected = exact_merge(
        base[name], [(torch.cat([torch.zeros(40, 2), b]), a, 2.0)], torch.float32
    )
    assert same_bits(load_folder(tmp_path / "merged")[name], expected)


def llama(folder: Path, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, num_key_value_heads=2, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_folder(folder)


def test_a_fused_adapter_on_split_projections(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    a, b = factors(40, 24, 3)
    c, d = factors(80, 24, 4)
    layer = "model.layers.0"
    adapter = save_peft(
        tmp_path / "adapter",
        {f"{layer}.self_attn.qkv_proj": (a, b), f"{layer}.mlp.gate_up_proj": (c, d)},
        lora_alpha=4,
    )
    report = lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    start = 0
    for part, count in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8)):
        name = f"{layer}.self_attn.{part}.weight"
        rows = b[start : start + count]
        assert same_bits(merged[name], exact_merge(base[name], [(rows, a, 2.0)], torch.float32))
        start += count
    for part, rows in (("gate_proj", d[:40]), ("up_proj", d[40:])):
        name = f"{layer}.mlp.{part}.weight"
        assert same_bits(merged[name], exact_merge(base[name], [(rows, c, 2.0)], torch.float32))
    assert len(report.rows) == 5
    assert (
        "qkv_proj was read as q_proj, k_proj, v_proj, one after the other" in report.facts["notes"]
    )


def test_dora_and_biases_follow_the_rows(tmp_path: Path) -> None:
    """PEFT's DoRA with biases on a split model, the same weights fused: the same result."""
    torch.manual_seed(0)
    model = qwen2()
    model.save_pretrained(tmp_path / "split")
    split = load_folder(tmp_path / "split")
    fused = dict(split)
    for layer in range(2):
        owner = f"model.layers.{layer}.self_attn"
        for part in ("weight", "bias"):
            parts = [fused.pop(f"{owner}.{each}.{part}") for each in ("q_proj", "k_proj", "v_proj")]
            fused[f"{owner}.qkv_proj.{part}"] = torch.cat(parts)
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused" / "model.safetensors")
    config = (tmp_path / "split" / "config.json").read_text()
    (tmp_path / "fused" / "config.json").write_text(config)
    for index, options in enumerate(({"use_dora": True}, {"lora_bias": True})):
        settings = LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
        )
        adapter = tmp_path / f"adapter{index}"
        randomised(qwen2(), settings).save_pretrained(adapter)
        lt.merge(tmp_path / "split", adapter, tmp_path / f"one{index}")
        lt.merge(tmp_path / "fused", adapter, tmp_path / f"two{index}")
        one, two = load_folder(tmp_path / f"one{index}"), load_folder(tmp_path / f"two{index}")
        for part in ("weight", "bias"):
            parts = [
                one[f"model.layers.1.self_attn.{each}.{part}"]
                for each in ("q_proj", "k_proj", "v_proj")
            ]
            assert same_bits(two[f"model.layers.1.self_attn.qkv_proj.{part}"], torch.cat(parts))


def test_what_the_config_does_not_decide_is_an_error(tmp_path: Path) -> None:
    """Without a config nothing tells how many rows are queries."""
    config = FUSED["phi3"][0]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    adapter = save_peft(
        tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": factors(24, 24, 0)}
    )
    with pytest.raises(NothingMatches, match=r"match(es)? no tensor"):
        lt.merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_a_part_of_the_wrong_size_and_a_part_named_twice(tmp_path: Path) -> None:
    config = FUSED["phi3"][0]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    owner = "model.layers.0.self_attn"
    small = save_peft(tmp_path / "a1", {f"{owner}.k_proj": factors(24, 24, 0)})
    with pytest.raises(ShapeMismatch, match=r"\[24, 24\].*\[8, 24\]"):
        lt.merge(tmp_path / "base", small, tmp_path / "merged")
    twice = save_peft(
        tmp_path / "a2",
        {f"{owner}.k_proj": factors(8, 24, 0), f"{owner}.qkv_proj": factors(40, 24, 1)},
    )
    with pytest.raises(DisagreementError, match="two updates of the adapter claim it"):
        lt.merge(tmp_path / "base", twice, tmp_path / "merged")


# Experts --------------------------------------------------------------------------------------

MOE = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
MIXTURES: dict[str, AutoConfig] = {
    "mixtral": MixtralConfig(**SIZES, **HEADS, **MOE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, **HEADS, **MOE, num_experts=4, moe_intermediate_size=16, head_dim=8
    ),
    "gpt_oss": GptOssConfig(**SIZES, **HEADS, **MOE, num_local_experts=4, head_dim=8),
    "gpt_oss of squares": GptOssConfig(
        **SIZES, **(HEADS | {"intermediate_size": 24}), **MOE, num_local_experts=4, head_dim=8
    ),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_merged_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    """Whether the checkpoint stores them one by one (Mixtral, Qwen3) or fused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[kind])
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = lt.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = load_folder(tmp_path / "merged"), load_folder(tmp_path / "theirs")
    base = load_folder(tmp_path / "base")
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=2e-6)
        assert torch.equal(value, base[name]) == torch.equal(theirs[name], base[name])
    assert any(".experts." in row.name for row in report.rows)


def test_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES["gpt_oss"]).save_pretrained(tmp_path / "base")
    adapter = save_peft(
        tmp_path / "adapter",
        {"model.layers.0.mlp.experts": factors(24, 40, 0, rank=6)},
        r=2,
        target_parameters=["mlp.experts.down_proj"],
        target_modules=[],
    )
    with pytest.raises(ShapeMismatch, match=r"holds 4 matrices.*updates for 3"):
        lt.merge(tmp_path / "base", adapter, tmp_path / "merged")
