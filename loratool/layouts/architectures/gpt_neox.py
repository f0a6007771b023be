"""GPT-NeoX and Pythia: q, k and v of each head side by side in one matrix."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, linear, norm


@architecture("gpt_neox", tied=False, head="embed_out")
def gpt_neox(sizes: Sizes) -> Parameters:
    """embed_in, blocks with biases everywhere unless the config says no, a final norm."""
    width = sizes.number("hidden_size")
    inner = sizes.number("intermediate_size")
    bias = sizes.flag("attention_bias", default=True)
    yield "embed_in.weight", (sizes.number("vocab_size"), width)
    for layer in sizes.layers("num_hidden_layers"):
        block = f"layers.{layer}"
        yield from norm(f"{block}.input_layernorm", width)
        yield from norm(f"{block}.post_attention_layernorm", width)
        yield from linear(f"{block}.attention.query_key_value", width, 3 * width, bias=bias)
        yield from linear(f"{block}.attention.dense", width, width, bias=bias)
        yield from linear(f"{block}.mlp.dense_h_to_4h", width, inner)
        yield from linear(f"{block}.mlp.dense_4h_to_h", inner, width)
    yield from norm("final_layer_norm", width)
