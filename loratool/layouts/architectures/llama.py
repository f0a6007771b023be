"""Llama and the models built like it: gated MLP, root-mean-square norms, grouped key heads."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, linear, norm


@architecture("llama", "mistral", tied=False)
def llama(sizes: Sizes) -> Parameters:
    """Without biases, unless the config has them."""
    return _blocks(
        sizes, qkv_bias=sizes.flag("attention_bias"), o_bias=sizes.flag("attention_bias")
    )


@architecture("gemma")
def gemma(sizes: Sizes) -> Parameters:
    """As Llama, its head tied to the embedding."""
    return _blocks(
        sizes, qkv_bias=sizes.flag("attention_bias"), o_bias=sizes.flag("attention_bias")
    )


@architecture("qwen2", tied=False)
def qwen2(sizes: Sizes) -> Parameters:
    """Biases on q, k and v alone."""
    return _blocks(sizes, qkv_bias=True, o_bias=False)


@architecture("qwen3", tied=False)
def qwen3(sizes: Sizes) -> Parameters:
    """Norms on the heads of q and k."""
    bias = sizes.flag("attention_bias")
    return _blocks(sizes, qkv_bias=bias, o_bias=bias, head_norms=True)


@architecture("phi3", tied=False)
def phi3(sizes: Sizes) -> Parameters:
    """q, k and v fused, gate and up fused."""
    return _blocks(sizes, qkv_bias=False, o_bias=False, fused=True)


def _blocks(
    sizes: Sizes,
    *,
    qkv_bias: bool,
    o_bias: bool,
    head_norms: bool = False,
    fused: bool = False,
) -> Parameters:
    width = sizes.number("hidden_size")
    inner = sizes.number("intermediate_size")
    heads = sizes.number("num_attention_heads")
    head = sizes.number("head_dim", default=max(1, width // heads))
    queries = heads * head
    keys = sizes.number("num_key_value_heads", default=heads) * head
    mlp_bias = sizes.flag("mlp_bias")
    yield "embed_tokens.weight", (sizes.number("vocab_size"), width)
    for layer in sizes.layers("num_hidden_layers"):
        block = f"layers.{layer}"
        if fused:
            yield from linear(f"{block}.self_attn.qkv_proj", width, queries + 2 * keys, bias=False)
        else:
            for part, outputs in (("q", queries), ("k", keys), ("v", keys)):
                name = f"{block}.self_attn.{part}_proj"
                yield from linear(name, width, outputs, bias=qkv_bias)
        yield from linear(f"{block}.self_attn.o_proj", queries, width, bias=o_bias)
        if head_norms:
            for part in ("q", "k"):
                yield from norm(f"{block}.self_attn.{part}_norm", head, bias=False)
        if fused:
            yield from linear(f"{block}.mlp.gate_up_proj", width, 2 * inner, bias=False)
        else:
            for part in ("gate", "up"):
                yield from linear(f"{block}.mlp.{part}_proj", width, inner, bias=mlp_bias)
        yield from linear(f"{block}.mlp.down_proj", inner, width, bias=mlp_bias)
        yield from norm(f"{block}.input_layernorm", width, bias=False)
        yield from norm(f"{block}.post_attention_layernorm", width, bias=False)
    yield from norm("norm", width, bias=False)
