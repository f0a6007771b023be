"""Writing an adapter folder: the adapter's files, with its report beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import Adapter, LowRankUpdate
from loratool.algebra.blocks import all_finite
from loratool.algebra.lowrank import LowRank
from loratool.algebra.stacking import at_scale
from loratool.errors import NonFiniteValues, RangeOverflow, UsageError
from loratool.formats import peft
from loratool.formats.written import Encoded
from loratool.provenance import REPORT_FILE
from loratool.storage.dtypes import F32, USER_NAMES, DType
from loratool.storage.early import EarlyFile
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.writing import park, write_tensors

METADATA = {"format": "pt"}
"""Of an adapter's safetensors file."""

_STORED = {dtype.name for dtype in USER_NAMES.values()}


def write_adapter(
    folder: Path,
    adapter: Adapter,
    report: Mapping[str, Any],
    base_modules: Iterable[str] | None = None,
    config: Mapping[str, Any] | None = None,
    early: EarlyFile | None = None,
) -> None:
    """adapter_model.safetensors, adapter_config.json (PEFT's layout) and the report, in an existing
    folder.

    config: fields of adapter_config.json that differ from what the adapter says. early: the
    adapter's file, if it was begun.
    """
    tensors, side_files = peft.encode(adapter, base_modules)
    if config:
        fields = json.loads(side_files[peft.CONFIG_FILE]) | dict(config)
        text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        side_files = {**side_files, peft.CONFIG_FILE: text.encode()}
    write_encoded(folder, Encoded(peft.WEIGHTS_FILE, tensors, side_files), report, early)


def write_encoded(
    folder: Path,
    encoded: Encoded,
    report: Mapping[str, Any],
    early: EarlyFile | None = None,
) -> None:
    """An adapter's files in any format, and the report, in an existing folder."""
    placed = early.finish(encoded.tensors, METADATA) if early is not None else ()
    write_tensors(folder / encoded.weights_file, encoded.tensors, METADATA, placed)
    for name, content in encoded.side_files.items():
        (folder / name).write_bytes(content)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")


def dtype_of_factors(text: str | None, factors: Iterable[LazyTensor]) -> DType:
    """The dtype that the user named, or the one that holds every factor's values.

    float32 for anything else than 16- and 32-bit floats. Raises UsageError for an unknown name.
    """
    if text is not None:
        if text not in USER_NAMES:
            raise UsageError(f"unknown dtype {text!r}", hint="choose float32, float16 or bfloat16")
        return USER_NAMES[text]
    found = {factor.dtype.name: factor.dtype for factor in factors}
    if len(found) == 1 and set(found) <= _STORED:
        return next(iter(found.values()))
    return F32


def load_update(label: str, update: LowRankUpdate, device: torch.device) -> LowRank:
    """An update as its module has it: b (out, r), a (r, in); kernels flattened.

    Raises NonFiniteValues naming adapter and tensor.
    """
    factors = []
    for factor in (update.b, update.a):
        values = factor.read().flatten(1).to(device)
        if not all_finite(values.double()):  # which torch cannot say of 8-bit floats
            name = factor.name if isinstance(factor, TensorInfo) else "a factor"
            raise NonFiniteValues(
                f"{label}: {name} holds NaN or infinity",
                hint="the adapter is broken, or its training diverged",
            )
        factors.append(values)
    return LowRank(factors[0], factors[1], update.scale)


def in_scale(value: LowRank, scale: float) -> LowRank:
    """The same update with another scale, not zero; float64 factors that share the change."""
    if value.scale == scale:
        return value
    return at_scale(LowRank(value.b.double(), value.a.double(), value.scale), scale)


def stored_value(name: str, value: LowRank, dtype: DType) -> LowRank:
    """The factors rounded to the dtype they are stored in. Raises RangeOverflow."""
    assert dtype.torch is not None
    stored = LowRank(value.b.to(dtype.torch), value.a.to(dtype.torch), value.scale)
    for factor in (stored.b, stored.a):
        if not all_finite(factor.double()):
            raise RangeOverflow(
                f"{name}: a factor exceeds the range of {dtype.name}", hint="use --dtype float32"
            )
    return stored


def park_update(path: Path, stored: LowRank, like: LowRankUpdate) -> LowRankUpdate:
    """The factors on disk until all are known, in the shape of the module that ``like`` updates."""
    return park_factors(path, stored, like.kernel, is_embedding=like.is_embedding)


def park_factors(
    path: Path, stored: LowRank, kernel: tuple[int, ...], *, is_embedding: bool
) -> LowRankUpdate:
    """The same by the kernel, (in, k…) of a convolution and () of a matrix."""
    b, a = module_factors(stored, kernel)
    parked = park(path, {"b": b, "a": a})
    alpha = stored.scale * stored.rank
    return LowRankUpdate(parked["b"], parked["a"], stored.scale, alpha, is_embedding)


def module_factors(value: LowRank, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """b and a as PEFT's module holds them: a kernel's are (out, r, 1…) and (r, in, k…)."""
    if not kernel:
        return value.b, value.a
    b = value.b.reshape(*value.b.shape, *(1 for _ in kernel[1:]))
    return b, value.a.reshape(value.rank, *kernel)
