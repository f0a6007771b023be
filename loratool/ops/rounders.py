"""From the updates placed on one tensor to the arithmetic that carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratool.adapter import LowRankUpdate, Replacement
from loratool.algebra.kernels import decide_bf16_when_loaded
from loratool.algebra.lowrank import LowRank
from loratool.algebra.rounding import CertifiedSum, RoundedBlock, Rounder, round_once
from loratool.errors import NonFiniteValues, UnsupportedInput
from loratool.layouts.placing import PlacedUpdate
from loratool.storage.tensors import LazyTensor


def rounder_of(
    updates: Sequence[PlacedUpdate],
    base: LazyTensor,
    start: int,
    stop: int,
    *,
    device: torch.device,
    compiled: bool = False,
) -> Rounder:
    """The rounder for rows ``start:stop`` of a tensor; its own rows count from ``start``.

    updates: all that are placed on the tensor; their weights may have either sign. base: the
    tensor they were made for, which some kinds need beyond the rows asked for. compiled:
    whether loading the compiled pass pays; the result is the same. Raises NonFiniteValues and
    UnsupportedInput naming the update.
    """
    replacing = [update for update in updates if isinstance(update.update, Replacement)]
    if replacing:
        (only,) = updates
        assert isinstance(only.update, Replacement)
        return ReplacedRows(only.source, only.update.value, start)
    terms = [_low_rank(update, start, stop, device) for update in updates]
    try:
        return CertifiedSum(terms, find_pass=decide_bf16_when_loaded if compiled else _plain)
    except (NonFiniteValues, UnsupportedInput) as error:
        sources = " + ".join(dict.fromkeys(update.source for update in updates))
        raise type(error)(f"{sources}: {error.message}") from None


@dataclass(frozen=True)
class ReplacedRows:
    """Rows that become those of ``value``, from row ``start`` on; what was there does not matter.

    source: the adapter's name for the parameter.
    """

    source: str
    value: LazyTensor
    start: int

    def add_to(self, w0: Tensor, first_row: int, dtype: torch.dtype) -> RoundedBlock:
        """Those rows, each value rounded once. Raises NonFiniteValues."""
        first = self.start + first_row
        rows = self.value.read_rows(first, first + len(w0)).reshape(w0.shape).to(w0.device)
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteValues(f"{self.source}: the adapter holds NaN or infinity")
        values = round_once(rows, dtype)
        overflowed = int(torch.isinf(values).sum())
        return RoundedBlock(values, int((values != w0).sum()), 0, 0, overflowed)


def _low_rank(placed: PlacedUpdate, start: int, stop: int, device: torch.device) -> LowRank:
    update = placed.update
    assert isinstance(update, LowRankUpdate)
    value = update.load()
    value = value.T if placed.transposed else value
    part = value.rows(start, stop)
    return LowRank(part.b.to(device), part.a.to(device), part.scale * placed.weight)


def _plain() -> None:
    """No compiled pass: for a small merge, loading it takes longer than it saves."""
