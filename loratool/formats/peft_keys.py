"""What the names of tensors in a PEFT adapter mean."""

from __future__ import annotations

import re

PREFIX = "base_model.model."

FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
FACTOR_BIAS = re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")
MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
DIAGONAL = re.compile(r"(.+)\.lora_diag(?:\.default)?")
LYCORIS = re.compile(r"(.+)\.((?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(?:\.default)?(?:\.weight)?")
TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
SAVED = re.compile(r"(.+)\.modules_to_save(?:\.default)?\.([^.]+)")
BASE_COPY = re.compile(r"(.+)\.(?:original_module|base_layer)\.(weight|bias)")
