"""OPT."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, linear, norm


@architecture("opt")
def opt(sizes: Sizes) -> Parameters:
    """The decoder; its position table has two rows more than positions."""
    width = sizes.number("hidden_size")
    inner = sizes.number("ffn_dim")
    embedded = sizes.number("word_embed_proj_dim", default=width)
    bias = sizes.flag("enable_bias", default=True)
    affine = sizes.flag("layer_norm_elementwise_affine", default=True)
    yield "decoder.embed_tokens.weight", (sizes.number("vocab_size"), embedded)
    yield "decoder.embed_positions.weight", (sizes.number("max_position_embeddings") + 2, width)
    if embedded != width:
        yield from linear("decoder.project_out", width, embedded, bias=False)
        yield from linear("decoder.project_in", embedded, width, bias=False)
    final = sizes.flag("do_layer_norm_before", default=True)
    if final and not sizes.flag("_remove_final_layer_norm") and affine:
        yield from norm("decoder.final_layer_norm", width)
    for layer in sizes.layers("num_hidden_layers"):
        block = f"decoder.layers.{layer}"
        for part in ("k", "v", "q", "out"):
            yield from linear(f"{block}.self_attn.{part}_proj", width, width, bias=bias)
        yield from linear(f"{block}.fc1", width, inner, bias=bias)
        yield from linear(f"{block}.fc2", inner, width, bias=bias)
        if affine:
            yield from norm(f"{block}.self_attn_layer_norm", width)
            yield from norm(f"{block}.final_layer_norm", width)
