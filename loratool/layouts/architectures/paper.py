"""The systems of the LoRA paper (Hu et al., 2022) by name, as configs of transformers' classes.

Sizes are those of the models' own published configs; GPT-3's are from Brown et al. (2020), table
2.1, with GPT-2's vocabulary and a context of 2048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MILLION = 10**6

_ROBERTA = {
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "tie_word_embeddings": True,
}
_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 1024,
    "tie_word_embeddings": True,
}

NAMED: dict[str, dict[str, Any]] = {
    "roberta-base": {
        **_ROBERTA,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "roberta-large": {
        **_ROBERTA,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "deberta-xxl": {
        "model_type": "deberta-v2",
        "architectures": ["DebertaV2ForMaskedLM"],
        "vocab_size": 128100,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "tie_word_embeddings": True,
    },
    "gpt2-medium": {**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt3-175b": {**_GPT2, "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048},
}


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables: LoRA on query and value. printed: trained parameters in
    millions, as the paper has them."""

    model: str
    rank: int
    printed: str

    def agrees(self, parameters: int) -> bool:
        """Whether this count, rounded or cut off, is what is printed."""
        places = len(self.printed.partition(".")[2])
        cut_off = parameters * 10**places // _MILLION
        return self.printed in (
            f"{parameters / _MILLION:.{places}f}",
            f"{cut_off / 10**places:.{places}f}",
        )


PUBLISHED = (
    Published("roberta-base", 8, "0.3"),
    Published("roberta-large", 8, "0.8"),
    Published("deberta-xxl", 16, "4.7"),
    Published("gpt2-medium", 4, "0.35"),
    Published("gpt2-large", 4, "0.77"),
    Published("gpt3-175b", 1, "4.7"),
    Published("gpt3-175b", 4, "18.8"),
    Published("gpt3-175b", 8, "37.7"),
)
