"""What PEFT keeps beside the factors of a module: DoRA's magnitudes and lora_bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratool.adapter import Adapter, DenseUpdate, DoraUpdate, LowRankUpdate, module_of
from loratool.errors import Unplaced
from loratool.formats.peft_keys import PREFIX
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor
from loratool.storage.views import Reshaped


def beside_factors(
    adapter: Adapter, low_rank: Mapping[str, LowRankUpdate]
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Tensors and config entries for magnitudes and bias differences.

    low_rank: every updated module's factors. Both settings are for a whole adapter: all modules
    have a magnitude, and all have a bias difference, of zeros where none is known. Raises Unplaced
    where PEFT cannot say what the adapter does.
    """
    magnitudes = {
        module_of(name): update.magnitude
        for name, update in adapter.updates.items()
        if isinstance(update, DoraUpdate)
    }
    biases = {
        module_of(name): (name, update)
        for name, update in adapter.updates.items()
        if isinstance(update, DenseUpdate)
    }
    tensors: dict[str, LazyTensor] = {}
    config: dict[str, Any] = {}
    if magnitudes:
        config["use_dora"] = True
        for module, update in low_rank.items():
            if module not in magnitudes:
                raise Unplaced(
                    f"{module}: has no magnitude; in PEFT either every module is a DoRA or none"
                )
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = _shaped(magnitudes[module], update)
    if biases:
        config["lora_bias"] = True
        _check_biases(biases, low_rank, bool(magnitudes))
        for module, update in low_rank.items():
            key = f"{PREFIX}{module}.lora_B.bias"
            outputs = update.b.shape[0]
            known = biases.get(module)
            tensors[key] = known[1].value if known else _Zeros(update.b.dtype, (outputs,))
    return tensors, config


def _check_biases(
    biases: Mapping[str, tuple[str, DenseUpdate]],
    low_rank: Mapping[str, LowRankUpdate],
    is_dora: bool,
) -> None:
    for module, (name, update) in biases.items():
        factors = low_rank.get(module)
        if factors is None or not name.endswith(".bias"):
            raise Unplaced(f"{name}: PEFT stores a difference only of an updated module's bias")
        if update.scale != factors.scale:
            raise Unplaced(
                f"{name}: has scale {update.scale:g}, its module {factors.scale:g}; PEFT has one"
            )
    embedding = next((module for module, update in low_rank.items() if update.is_embedding), None)
    if is_dora or embedding is not None:
        reason = f"{embedding}: is an embedding" if embedding else "the adapter is a DoRA"
        raise Unplaced(f"{reason}, which PEFT's lora_bias does not go with")


def _shaped(magnitude: LazyTensor, update: LowRankUpdate) -> LazyTensor:
    """As PEFT's module has it: (out,), and (1, out, 1…) of a convolution."""
    if not update.kernel:
        return magnitude
    return Reshaped(magnitude, (1, update.b.shape[0], *(1 for _ in update.kernel[1:])))


@dataclass(frozen=True)
class _Zeros:
    """A tensor of zeros."""

    dtype: DType
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        assert self.dtype.torch is not None
        return torch.zeros(self.shape, dtype=self.dtype.torch)

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.read()[start:stop]
