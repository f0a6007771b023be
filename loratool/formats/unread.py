"""What gives away an adapter in a format that has no codec here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NAMES = (
    (r"lora_(unet|te\d?|transformer)_", "kohya"),
    (r"lycoris_|.*(hada_w1|lokr_w|oft_blocks)", "LyCORIS"),
    (r".*\.lora\.|unet:|text_encoder:", "diffusers, before PEFT"),
    (r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\.", "diffusers"),
    (r".*lora_(down|up)", "lora_down and lora_up"),
    (r".*\.linear_in\.", "linear_in and linear_out"),
    (r".*lora_[ab]", "lora_a and lora_b"),
    (r".*lora_[AB]", "lora_A and lora_B"),
)
"""How a key starts → the format's name, the most telling first."""

_PARTS = (
    "lora_down",
    "lora_up",
    ".lora.",
    "lora_a",
    "lora_b",
    "lora_A",
    "lora_B",
    "hada_w1",
    "lokr_w",
    "oft_blocks",
    "unet:",
    "text_encoder:",
    ".linear_in.",
)
"""What makes a key an adapter's."""


@dataclass(frozen=True)
class UnreadFormat:
    """A format by name, and the key that gives it away."""

    name: str
    key: str


def unread_format(keys: Iterable[str]) -> UnreadFormat | None:
    """Which format keys are in that look like an adapter's; None where none does."""
    for key in sorted(keys):
        if any(part in key for part in _PARTS):
            name = next((name for start, name in _NAMES if re.match(start, key)), "unknown")
            return UnreadFormat(name, key)
    return None
