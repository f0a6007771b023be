"""GPT-2, and GPT-3 by its sizes: transformers' Conv1D stores weights (in, out)."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, norm


@architecture("gpt2")
def gpt2(sizes: Sizes) -> Parameters:
    """wte, wpe, and blocks of c_attn (q, k and v fused), c_proj and a two-layer MLP."""
    width = sizes.number("n_embd")
    inner = sizes.number("n_inner", default=4 * width)
    yield "wte.weight", (sizes.number("vocab_size"), width)
    yield "wpe.weight", (sizes.number("n_positions", "n_ctx"), width)
    for layer in sizes.layers("n_layer"):
        block = f"h.{layer}"
        yield from norm(f"{block}.ln_1", width)
        yield from _conv1d(f"{block}.attn.c_attn", width, 3 * width)
        yield from _conv1d(f"{block}.attn.c_proj", width, width)
        yield from norm(f"{block}.ln_2", width)
        yield from _conv1d(f"{block}.mlp.c_fc", width, inner)
        yield from _conv1d(f"{block}.mlp.c_proj", inner, width)
    yield from norm("ln_f", width)


def _conv1d(name: str, inputs: int, outputs: int) -> Parameters:
    yield f"{name}.weight", (inputs, outputs)
    yield f"{name}.bias", (outputs,)
