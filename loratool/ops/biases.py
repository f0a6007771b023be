"""Differences of biases (PEFT's lora_bias): vectors stored beside their module's factors, with the
module's scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import DenseUpdate, LowRankUpdate, module_of
from loratool.algebra.lowrank import LowRank
from loratool.errors import DisagreementError, NonFiniteValues, RangeOverflow
from loratool.storage.dtypes import DType
from loratool.storage.tensors import MemoryTensor


@dataclass(frozen=True)
class StoredBias:
    """A difference as it is stored. error: ‖exact − stored‖."""

    update: DenseUpdate
    error: float


def weight_of(bias: str) -> str:
    """``a.b.bias`` → ``a.b.weight``."""
    return f"{module_of(bias)}.weight"


def load_bias(label: str, name: str, update: DenseUpdate) -> LowRank:
    """The difference as a matrix of one column. Raises NonFiniteValues."""
    values = update.value.read()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteValues(f"{label}: the difference of {name} holds NaN or infinity")
    return LowRank(values.reshape(-1, 1), torch.ones(1, 1, dtype=torch.float32), update.scale)


def store_bias(name: str, exact: Tensor, module: LowRankUpdate, dtype: DType) -> StoredBias:
    """exact: (out,) float64. Raises RangeOverflow."""
    assert dtype.torch is not None
    values = (exact / module.scale).to(dtype.torch)
    if not bool(torch.isfinite(values).all()):
        raise RangeOverflow(
            f"{name}: exceeds the range of {dtype.name}", hint="use another --dtype"
        )
    error = float((exact - values.double() * module.scale).norm())
    return StoredBias(DenseUpdate(MemoryTensor(values), module.scale), error)


def check_biases(label: str, biases: Mapping[str, object], weights: Mapping[str, object]) -> None:
    """Raises DisagreementError for a bias whose module's weight has no update."""
    for name in biases:
        if weight_of(name) not in weights:
            raise DisagreementError(
                f"{label}: {name} has a difference, but the weight beside it no update",
                hint="PEFT stores them together; leave both out, or neither",
            )
