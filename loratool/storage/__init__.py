"""Containers of tensors and atomic outputs. Has never heard of LoRA; imports only errors."""
