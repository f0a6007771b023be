"""Matrices of varied decay, for claims that must hold on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Decay = Callable[[Tensor], Tensor]
"""From 1, 2, … to the singular values, float64."""


def _step(*levels: tuple[int, float], rest: float) -> Decay:
    """Levels up to given numbers of values, then ``rest``."""

    def decay(i: Tensor) -> Tensor:
        values = torch.full_like(i, rest)
        for count, level in reversed(levels):
            values = torch.where(i <= count, level, values)
        return values

    return decay


DECAYS: dict[str, Decay] = {
    "rank 1": _step((1, 1.0), rest=0.0),
    "rank 5": _step((5, 1.0), rest=0.0),
    "rank 30, falling": lambda i: torch.where(i <= 30, 0.8**i, 0.0),
    "power 1/4": lambda i: i**-0.25,
    "power 1/2": lambda i: i**-0.5,
    "power 1": lambda i: 1 / i,
    "power 2": lambda i: i**-2.0,
    "power 4": lambda i: i**-4.0,
    "exponential 0.5": lambda i: 0.5**i,
    "exponential 0.8": lambda i: 0.8**i,
    "exponential 0.95": lambda i: 0.95**i,
    "exponential 0.99": lambda i: 0.99**i,
    "flat": torch.ones_like,
    "flat, zero tail": lambda i: torch.where(i <= 60, 1.0, 0.0),
    "linear": lambda i: (i.max() + 1 - i) / i.max(),
    "gap after 4": _step((4, 1.0), rest=0.01),
    "gap after 12": _step((12, 1.0), rest=0.2),
    "clusters": _step((3, 1.0), (10, 0.5), (25, 0.3), (70, 0.1), rest=0.02),
    "one huge": _step((1, 1e5), rest=1.0),
    "power 1 on a floor": lambda i: 1 / i + 0.02,
    "rank 8 on a floor": _step((8, 1.0), rest=0.03),
    "rank 8 on a low floor": _step((8, 1.0), rest=1e-4),
}
SHAPES = ((260, 190), (190, 260), (200, 200), (900, 180))
SCALES = (1.0, 1e-30, 1e30)
RANKS = (1, 4, 8, 12, 20)
"""Those that a randomised method is worth its while for, at these shapes."""


@dataclass(frozen=True)
class Case:
    """One matrix by its recipe."""

    decay: str
    shape: tuple[int, int]
    scale: float

    @property
    def name(self) -> str:
        return f"{self.decay}, {self.shape[0]}×{self.shape[1]}, {self.scale:g}"

    def matrix(self) -> Tensor:
        """(m, n) float32."""
        count = min(self.shape)
        values = DECAYS[self.decay](torch.arange(1, count + 1, dtype=torch.float64))
        return with_spectrum(*self.shape, values * self.scale, zlib.crc32(self.name.encode()))


def cases() -> Iterator[Case]:
    """Every decay in every shape; the scale changes from one to the next."""
    for number, decay in enumerate(DECAYS):
        for turn, shape in enumerate(SHAPES):
            yield Case(decay, shape, SCALES[(number + turn) % len(SCALES)])
            if (number + turn) % len(SCALES):
                yield Case(decay, shape, 1.0)


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix whose singular values are ``values``."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    u = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return ((u * values) @ v.T).float()
