"""BERT and RoBERTa."""

from __future__ import annotations

from loratool.layouts.architectures.registry import Parameters, Sizes, architecture, linear, norm

_BERT_WITH_POOLER = ("BertModel", "BertForSequenceClassification", "BertForPreTraining")
_ROBERTA_WITH_POOLER = ("RobertaModel", "XLMRobertaModel")


@architecture("bert", "roberta", "xlm-roberta")
def bert(sizes: Sizes) -> Parameters:
    """Embeddings with their norm, encoder layers, and the pooler where the class has one."""
    width = sizes.number("hidden_size")
    inner = sizes.number("intermediate_size")
    yield "embeddings.word_embeddings.weight", (sizes.number("vocab_size"), width)
    yield (
        "embeddings.position_embeddings.weight",
        (
            sizes.number("max_position_embeddings"),
            width,
        ),
    )
    yield (
        "embeddings.token_type_embeddings.weight",
        (
            sizes.number("type_vocab_size", default=2),
            width,
        ),
    )
    yield from norm("embeddings.LayerNorm", width)
    for layer in sizes.layers("num_hidden_layers"):
        block = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from linear(f"{block}.attention.self.{part}", width, width)
        yield from linear(f"{block}.attention.output.dense", width, width)
        yield from norm(f"{block}.attention.output.LayerNorm", width)
        yield from linear(f"{block}.intermediate.dense", width, inner)
        yield from linear(f"{block}.output.dense", inner, width)
        yield from norm(f"{block}.output.LayerNorm", width)
    if sizes.architecture in (*_BERT_WITH_POOLER, *_ROBERTA_WITH_POOLER):
        yield from linear("pooler.dense", width, width)
