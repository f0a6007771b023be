"""Parameters that adapters store whole: absolute values, which no weight can be applied to.

Equal values are kept. Different ones have no sum that means anything without the base, so that is
an error unless the user says which is meant: their weighted mean, the first, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from loratool.adapter import Adapter, Replacement
from loratool.errors import DisagreementError, ShapeMismatch, UsageError
from loratool.ops.combine_weights import Source
from loratool.plural import counted
from loratool.storage.dtypes import DType
from loratool.storage.tensors import LazyTensor, equal_values


class Saved(StrEnum):
    """What becomes of a parameter that several adapters store whole, with different values."""

    REFUSE = "refuse"
    MEAN = "mean"
    FIRST = "first"
    DROP = "drop"


def parse_saved(text: str) -> Saved:
    """Raises UsageError naming the choices."""
    try:
        return Saved(text)
    except ValueError:
        raise UsageError(f"saved {text!r}: choose refuse, mean, first or drop") from None


@dataclass(frozen=True)
class WeightedMean:
    """Σ wᵢVᵢ / Σ wᵢ in float64, rounded to the first one's dtype."""

    sources: tuple[LazyTensor, ...]
    weights: tuple[float, ...]

    @property
    def dtype(self) -> DType:
        return self.sources[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0].shape

    def read(self) -> Tensor:
        rows = self.shape[0] if self.shape else 1
        step = max(1, 2**20 * rows // max(1, torch.Size(self.shape).numel()))
        parts = [self.read_rows(i, min(i + step, rows)) for i in range(0, rows, step)]
        return torch.cat(parts) if self.shape and parts else self.read_rows(0, rows)

    def read_rows(self, start: int, stop: int) -> Tensor:
        assert self.dtype.torch is not None
        values = [source.read_rows(start, stop).double() for source in self.sources]
        mean = sum(
            (w * v for w, v in zip(self.weights[1:], values[1:], strict=True)),
            self.weights[0] * values[0],
        )
        return (mean / sum(self.weights)).to(self.dtype.torch)


def combine_saved(
    sources: Sequence[Source], adapters: Sequence[Adapter], saved: Saved
) -> tuple[dict[str, Replacement], list[str]]:
    """The parameters stored whole, and what there is to say about them.

    Raises DisagreementError for different values that the user has not decided about,
    ShapeMismatch for different shapes.
    """
    holders: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        for name in adapter.replacements:
            holders.setdefault(name, []).append(index)
    kept: dict[str, Replacement] = {}
    open_names, dropped = [], []
    for name, who in holders.items():
        values = [adapters[i].replacements[name].value for i in who]
        if any(value.shape != values[0].shape for value in values):
            shapes = ", ".join(
                f"{sources[i].label} {list(adapters[i].replacements[name].shape)}" for i in who
            )
            raise ShapeMismatch(
                f"{name}: is stored whole in different shapes ({shapes})",
                hint="leave it out with --exclude",
            )
        if saved is Saved.DROP:
            dropped.append(name)
        elif all(equal_values(values[0], value) for value in values[1:]) or saved is Saved.FIRST:
            kept[name] = Replacement(values[0])
        elif saved is Saved.MEAN:
            kept[name] = Replacement(weighted_mean(name, values, [sources[i].weight for i in who]))
        else:
            open_names.append(f"{name}: in {', '.join(sources[i].label for i in who)}")
    if open_names:
        raise DisagreementError(
            f"{counted(len(open_names), 'parameter is', 'parameters are')} stored whole with "
            "different values",
            details=open_names[:12],
            hint="absolute values do not add up; choose --saved mean, first or drop",
        )
    notes = []
    if kept:
        notes.append(f"stored whole and kept, without weights: {counted(len(kept), 'parameter')}")
    if dropped:
        notes.append(f"dropped, as asked: {counted(len(dropped), 'parameter')} stored whole")
    return kept, notes


def weighted_mean(
    name: str, values: Sequence[LazyTensor], weights: Sequence[float]
) -> WeightedMean:
    """Σ wᵢVᵢ / Σ wᵢ of the parameter of that name. Raises UsageError where Σ wᵢ is zero."""
    if sum(weights) == 0:
        raise UsageError(f"{name}: its adapters' weights add up to zero, so it has no mean")
    return WeightedMean(tuple(values), tuple(weights))
