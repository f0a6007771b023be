"""How much of a plain sum the adapters say more than once.

Two updates that point the same way add up to a longer one: at weight 1 each, n equal adapters make
n times the change that each was trained for. Inner products of the factors show it before anything
is tried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratool.combining.geometry import cosines

NOTED = 1.1
"""Reach from which on a sum is said to overshoot."""

ALIKE = 0.05
"""Cosine from which on that is for what two adapters share, and not for the size of one."""


@dataclass(frozen=True)
class Overlap:
    """Of whole adapters, a weight that one lacks counting as zero.

    cosines: (N, N) of the unweighted updates. own: the weight that each adapter has in the sum,
    averaged by energy. reach: ⟨Σⱼ wⱼΔWⱼ, ΔWᵢ⟩ / ‖ΔWᵢ‖², how often the sum contains what adapter i
    does; its own weight where the others have nothing in common with it. None of an adapter that
    changes nothing.
    """

    cosines: tuple[tuple[float, ...], ...]
    own: tuple[float | None, ...]
    reach: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "cosines": [list(row) for row in self.cosines],
            "own_weights": list(self.own),
            "reach": list(self.reach),
        }

    def notes(self, labels: Sequence[str]) -> list[str]:
        """A warning where a sum goes further in an adapter's direction than the adapter itself."""
        beyond = [
            (reach, i)
            for i, (reach, own) in enumerate(zip(self.reach, self.own, strict=True))
            if reach is not None
            and own is not None
            and reach > NOTED * max(1.0, own)
            and self._closest(i) >= ALIKE
        ]
        if not beyond:
            return []
        reach, i = max(beyond, key=lambda found: found[0])
        cosine = f"{self._closest(i):.2f}"
        return [
            f"the adapters share a part of what they do (cosines up to {cosine}) and the sum "
            f"repeats it: it contains what {labels[i]} does {reach:.2f} times. Weights that add "
            "up to 1, or --method linear or pico, keep the adapters' size"
        ]

    def _closest(self, adapter: int) -> float:
        """The largest cosine with another adapter."""
        others = [x for j, x in enumerate(self.cosines[adapter]) if j != adapter]
        return max(others, default=0.0)


def overlap_of(products: Sequence[Tensor], weights: Sequence[Sequence[float]]) -> Overlap:
    """From every weight matrix's inner products ⟨ΔWᵢ, ΔWⱼ⟩, (N, N), and the adapters' weights."""
    total = torch.stack(list(products)).sum(0)
    energy = total.diagonal()
    each = torch.tensor([list(row) for row in weights], dtype=torch.float64, device="cpu")
    own = sum(w * p.diagonal() for w, p in zip(each, products, strict=True))
    reach = sum(p @ w for w, p in zip(each, products, strict=True))
    assert isinstance(own, Tensor)
    assert isinstance(reach, Tensor)
    return Overlap(
        tuple(tuple(row) for row in cosines(total).tolist()),
        _shares(own, energy),
        _shares(reach, energy),
    )


def _shares(values: Tensor, energy: Tensor) -> tuple[float | None, ...]:
    return tuple(
        value / whole if whole > 0 else None
        for value, whole in zip(values.tolist(), energy.tolist(), strict=True)
    )
