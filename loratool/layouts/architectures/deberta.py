"""DeBERTa v2: disentangled attention with shared relative positions, a convolution in XXL."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, linear, norm


@architecture("deberta-v2")
def deberta_v2(sizes: Sizes) -> Parameters:
    """Embeddings, encoder layers, relative positions, and what the config switches on."""
    width = sizes.number("hidden_size")
    inner = sizes.number("intermediate_size")
    embedded = sizes.number("embedding_size", default=width)
    positions = sizes.number("max_position_embeddings", default=512)
    yield "embeddings.word_embeddings.weight", (sizes.number("vocab_size"), embedded)
    if sizes.flag("position_biased_input", default=True):
        yield "embeddings.position_embeddings.weight", (positions, embedded)
    types = sizes.value("type_vocab_size")
    if types:
        yield "embeddings.token_type_embeddings.weight", (sizes.number("type_vocab_size"), embedded)
    if embedded != width:
        yield from linear("embeddings.embed_proj", embedded, width, bias=False)
    yield from norm("embeddings.LayerNorm", width)
    relative = sizes.flag("relative_attention")
    attention = str(sizes.value("pos_att_type") or "")
    shared = sizes.flag("share_att_key")
    for layer in sizes.layers("num_hidden_layers"):
        block = f"encoder.layer.{layer}"
        for part in ("query_proj", "key_proj", "value_proj"):
            yield from linear(f"{block}.attention.self.{part}", width, width)
        if relative and not shared:
            if "c2p" in attention:
                yield from linear(f"{block}.attention.self.pos_key_proj", width, width)
            if "p2c" in attention:
                yield from linear(f"{block}.attention.self.pos_query_proj", width, width)
        yield from linear(f"{block}.attention.output.dense", width, width)
        yield from norm(f"{block}.attention.output.LayerNorm", width)
        yield from linear(f"{block}.intermediate.dense", width, inner)
        yield from linear(f"{block}.output.dense", inner, width)
        yield from norm(f"{block}.output.LayerNorm", width)
    if relative:
        yield from _relative_positions(sizes, width, positions)
    if sizes.value("conv_kernel_size"):
        kernel = sizes.number("conv_kernel_size")
        yield (
            "encoder.conv.conv.weight",
            (width, width // sizes.number("conv_groups", default=1), kernel),
        )
        yield "encoder.conv.conv.bias", (width,)
        yield from norm("encoder.conv.LayerNorm", width)


def _relative_positions(sizes: Sizes, width: int, positions: int) -> Parameters:
    most = sizes.value("max_relative_positions")
    reach = most if isinstance(most, int) and most > 0 else positions
    buckets = sizes.value("position_buckets")
    if isinstance(buckets, int) and buckets > 0:
        reach = buckets
    yield "encoder.rel_embeddings.weight", (2 * reach, width)
    if "layer_norm" in str(sizes.value("norm_rel_ebd") or ""):
        yield from norm("encoder.LayerNorm", width)
