"""vLLM: ranks in steps, one scaling, no modules_to_save, no biases, no embedding or head."""

from loratool.profiles.limits import Limits

LIMITS = Limits(
    one_rank=True,
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    whole_modules=False,
    biases=False,
    experts=False,
    embeddings=False,
    convolutions=False,
    other_kinds=False,
    refused_modules=frozenset({"lm_head", "embed_tokens"}),
    serve="serve with --enable-lora --max-lora-rank {rank}",
)
