"""PEFT's layout: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.formats.peft_config import CONFIG_FILE, TASK_HEADS
from loratool.formats.peft_decode import decode
from loratool.formats.peft_encode import check_kinds, encode, short_names
from loratool.formats.peft_keys import PREFIX

__all__ = [
    "CONFIG_FILE",
    "NAME",
    "PREFIX",
    "STORES_ALPHA",
    "TASK_HEADS",
    "WEIGHTS_FILE",
    "check_kinds",
    "decode",
    "detect",
    "encode",
    "short_names",
]

NAME = "PEFT"
STORES_ALPHA = True
WEIGHTS_FILE = "adapter_model.safetensors"

_MARKS = (".lora_", ".hada_w", ".lokr_w", "trainable_tokens_delta")


def detect(keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
    """A config with a peft_type, or keys with PEFT's prefix."""
    if CONFIG_FILE in side_files:
        return b'"peft_type"' in side_files[CONFIG_FILE]
    return any(key.startswith(PREFIX) and any(mark in key for mark in _MARKS) for key in keys)
