"""How 8-bit weights are scaled: which tensor holds the scales, and which weights each is for.

W = q · s in all of these, also where the name says ``inv`` (DeepSeek's and transformers'
``weight_scale_inv``); compressed-tensors and FBGEMM write ``weight_scale``. There is one scale for
a tensor, for each row, or for each block of rows and columns, the last ones cut short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.errors import UnsupportedInput
from loratool.layouts.config import ModelConfig
from loratool.plural import counted
from loratool.storage.dtypes import BF16, F16, F32
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.views import stored_in

_SUFFIXES = ("_scale_inv", "_scale")
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class ScaledBy:
    """The scales of one (rows, columns) tensor: one for each ``block`` of it; None: no scales."""

    scales: TensorInfo | None
    shape: tuple[int, int]
    block: tuple[int, int]

    def rows(self, first: int, last: int) -> Tensor:
        """Those of rows first:last in float64; broadcasts to (rows, columns)."""
        if self.scales is None:
            return torch.ones(1, 1, dtype=torch.float64)
        down, across = (-(-size // step) for size, step in zip(self.shape, self.block, strict=True))
        grid = self.scales.read().double().reshape(down, across)
        wanted = grid[torch.arange(first, last) // self.block[0]]
        return wanted.repeat_interleave(self.block[1], dim=1)[:, : self.shape[1]]


def scaled_by(name: str, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> ScaledBy | None:
    """The scales of an 8-bit tensor; None where the checkpoint has none.

    Raises UnsupportedInput for scales of a form that is not known.
    """
    found = next((tensors[name + end] for end in _SUFFIXES if name + end in tensors), None)
    if found is None:
        return None
    if found.dtype not in (F32, F16, BF16):
        raise UnsupportedInput(
            f"{found.name}: is {found.dtype.name}; scales are known in F32, F16 and BF16",
            hint="convert the base to 16 bits first",
        )
    info = tensors[name]
    if len(info.shape) == 2:
        shape = (info.shape[0], info.shape[1])
        for block in (shape, (1, shape[1]), *_blocks(config), _USUAL_BLOCK):
            grid = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
            if found.shape in (grid, _squeezed(grid)) or (found.numel == 1 and grid == (1, 1)):
                return ScaledBy(found, shape, block)
    raise UnsupportedInput(
        f"{found.name}: its shape {list(found.shape)} fits no known scaling of {name} "
        f"{list(info.shape)}",
        hint="known are one scale for a matrix, for each row, or for each block of the config's "
        "weight_block_size",
    )


def refuse_scaled(
    side: str, tensors: Mapping[str, TensorInfo], compared: Iterable[LazyTensor]
) -> None:
    """Raises UnsupportedInput where weights are codes that scales beside them give a meaning: their
    differences are no change of weights. side: base or tuned, whose tensors these are."""
    names = dict.fromkeys(info.name for one in compared for info in stored_in(one))
    scaled = [
        name
        for name in names
        if tensors[name].dtype.is_float
        and tensors[name].dtype.bits == 8
        and any(name + s in tensors for s in _SUFFIXES)
    ]
    if scaled:
        raise UnsupportedInput(
            f"{side}: {counted(len(scaled), 'weight is', 'weights are')} stored in 8 bits with "
            "scales beside them, and such checkpoints are not compared",
            details=scaled[:3],
            hint=f"convert {side} to 16 bits first",
        )


def _squeezed(grid: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in grid if size != 1)


def _blocks(config: ModelConfig) -> list[tuple[int, int]]:
    """Block sizes that the config names."""
    quantization = config.values.get("quantization_config")
    if not isinstance(quantization, dict):
        return []
    named = [quantization.get("weight_block_size")]
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        named.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    return [
        (block[0], block[1])
        for block in named
        if isinstance(block, list)
        and len(block) == 2
        and all(isinstance(size, int) and size > 0 for size in block)
    ]
