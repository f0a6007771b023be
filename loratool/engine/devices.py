"""Which device computes."""

from __future__ import annotations

import torch

from loratool.errors import UsageError


def resolve_device(text: str) -> torch.device:
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises UsageError for anything else and for a GPU that is not there.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = text.partition(":")
    if kind == "cpu" and not number:
        return torch.device("cpu")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise UsageError(f"unknown device {text!r}", hint="choose auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError("no CUDA device is available here", hint="use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(f"there is no device {text}; this machine has {torch.cuda.device_count()}")
    return torch.device(text)
