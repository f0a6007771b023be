"""The one table of element types: safetensors name, torch dtype, size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loratool.errors import UsageError


@dataclass(frozen=True)
class DType:
    """An element type as files name it.

    ``torch`` is None for types that loratool copies but cannot compute with.
    """

    name: str
    bits: int
    torch: torch.dtype | None

    @property
    def is_float(self) -> bool:
        return self.torch is not None and self.torch.is_floating_point


_TABLE = [
    DType("F64", 64, torch.float64),
    DType("F32", 32, torch.float32),
    DType("F16", 16, torch.float16),
    DType("BF16", 16, torch.bfloat16),
    DType("F8_E4M3", 8, torch.float8_e4m3fn),
    DType("F8_E5M2", 8, torch.float8_e5m2),
    DType("F8_E8M0", 8, None),
    DType("F8_E4M3FNUZ", 8, torch.float8_e4m3fnuz),
    DType("F8_E5M2FNUZ", 8, torch.float8_e5m2fnuz),
    DType("F6_E2M3", 6, None),
    DType("F6_E3M2", 6, None),
    DType("F4", 4, None),
    DType("I64", 64, torch.int64),
    DType("I32", 32, torch.int32),
    DType("I16", 16, torch.int16),
    DType("I8", 8, torch.int8),
    DType("U64", 64, torch.uint64),
    DType("U32", 32, torch.uint32),
    DType("U16", 16, torch.uint16),
    DType("U8", 8, torch.uint8),
    DType("BOOL", 8, torch.bool),
    DType("C64", 64, torch.complex64),
]
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch is not None}

F64 = BY_NAME["F64"]
F32 = BY_NAME["F32"]
F16 = BY_NAME["F16"]
BF16 = BY_NAME["BF16"]
FLOATS = (F64, F32, F16, BF16)

USER_NAMES = {
    "float32": BY_NAME["F32"],
    "fp32": BY_NAME["F32"],
    "float16": BY_NAME["F16"],
    "fp16": BY_NAME["F16"],
    "bfloat16": BY_NAME["BF16"],
    "bf16": BY_NAME["BF16"],
}
"""What people type after ``--dtype``."""


def dtype_named(text: str) -> DType:
    """The dtype that a user typed. Raises UsageError."""
    if text not in USER_NAMES:
        raise UsageError(f"unknown dtype {text!r}", hint="choose float32, float16 or bfloat16")
    return USER_NAMES[text]
