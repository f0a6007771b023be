"""NearSwap: go over to the second update where it is near the first."""

from __future__ import annotations

from torch import Tensor

from loratool.algebra.row_blocks import RowBlocks, map_rows
from loratool.combining.elementwise import dense_updates
from loratool.combining.method import Parameter, Space, Updates, method

_T = Parameter(
    "t", float, 1e-4, "Difference up to which the second update is taken.", low=0, open_low=True
)


@method(
    "nearswap",
    space=Space.DENSE,
    source="alchemonaut 2024, QuartetAnemoi-70B (huggingface.co/alchemonaut), as in mergekit",
    cost="one pass over both updates' m·n elements per pass of the randomised factorisation",
    weights="multiply the updates",
    parameters=(_T,),
    adapters=(2, 2),
    notes="With one element's values a and b, the result is a + min(1, t/|a − b|)·(b − a).",
)
def nearswap(updates: Updates, *, t: float) -> RowBlocks:
    """The first update, moved towards the second by at most t in each element."""
    first, second = updates.weights

    def swap(_: int, one: Tensor, two: Tensor) -> Tensor:
        a, b = first * one.double(), second * two.double()
        return (a + (b - a).clamp(-t, t)).float()

    return map_rows(dense_updates(updates), swap)
