"""Which of the tensors that updates meet are stored in 8 bits, and how those are scaled."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.adapter import (
    DenseUpdate,
    DoraUpdate,
    HadamardUpdate,
    KroneckerUpdate,
    LowRankUpdate,
)
from loratool.algebra.certified_scaled import EIGHT_BITS
from loratool.errors import UnsupportedInput
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy, scaled_by
from loratool.ops.sources import Model

_TAKEN = (LowRankUpdate, DoraUpdate, DenseUpdate, HadamardUpdate, KroneckerUpdate)


def scales_of(
    updates: Mapping[str, tuple[PlacedUpdate, ...]], model: Model, *, lossy: bool
) -> dict[str, ScaledBy]:
    """The scales of the 8-bit tensors of ``model`` that updates meet.

    lossy: whether there need not be any. Raises UnsupportedInput for updates that 8 bits do not
    take.
    """
    tensors, scaled = model.checkpoint.tensors, {}
    for name, placed in updates.items():
        info = tensors.get(name)
        if info is None or info.dtype.torch not in EIGHT_BITS:
            continue
        other = [
            update.describe()
            for update in placed
            if not isinstance(update.update, _TAKEN) or update.member is not None
        ]
        if other or len(info.shape) != 2:
            raise UnsupportedInput(
                f"{name}: is stored in 8 bits, which only LoRA, DoRA, LoHa and LoKr can change",
                details=other,
                hint="convert the base to 16 bits first",
            )
        found = scaled_by(name, tensors, model.config)
        if found is None and not lossy:
            raise UnsupportedInput(
                f"{name}: is stored in 8 bits without scales, too coarse for most updates",
                hint="convert the base to 16 bits first, or merge --allow-lossy",
            )
        shape = (info.shape[0], info.shape[1])
        scaled[name] = found or ScaledBy(None, shape, shape)
    return scaled
