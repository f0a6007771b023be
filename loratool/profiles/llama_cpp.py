"""llama.cpp's convert_lora_to_gguf: one alpha for the file, low-rank factors and nothing else."""

from loratool.profiles.limits import Limits

LIMITS = Limits(
    one_rank=True,
    whole_modules=False,
    biases=False,
    experts=False,
    convolutions=False,
    other_kinds=False,
)
