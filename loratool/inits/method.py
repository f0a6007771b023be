"""What an initialisation is: a function from a weight, or its shape, to factors to train from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from loratool.algebra.lowrank import LowRank


@dataclass(frozen=True)
class Start:
    """What is asked for one module.

    shape: (out, in) of the weight as a matrix. scale: what the module multiplies B·A with. key:
    what random numbers depend on (a seed and the name).
    """

    shape: tuple[int, int]
    rank: int
    scale: float
    key: str


@dataclass(frozen=True)
class Init:
    """A registered initialisation.

    from_shape or from_weight, one of the two: the second takes the weight, float32 (out, in), and
    its update is subtracted from the base, which must then be written too.
    """

    name: str
    source: str
    from_shape: Callable[[Start], LowRank] | None = None
    from_weight: Callable[[Tensor, Start], LowRank] | None = None

    @property
    def changes_base(self) -> bool:
        """Whether training goes on from a residual base instead of the base."""
        return self.from_weight is not None
