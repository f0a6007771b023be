"""SGLang: one rank for all modules of an adapter, nothing stored whole."""

from loratool.profiles.limits import Limits

LIMITS = Limits(
    one_rank=True,
    whole_modules=False,
    biases=False,
    experts=False,
    embeddings=False,
    convolutions=False,
    other_kinds=False,
    refused_modules=frozenset({"lm_head", "embed_tokens"}),
    serve="serve with --max-lora-rank {rank}",
)
