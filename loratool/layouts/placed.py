"""Updates that know which tensor of a checkpoint they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from loratool.adapter import Update
from loratool.plural import counted
from loratool.storage.tensors import LazyTensor


@dataclass(frozen=True)
class PlacedUpdate:
    """An update that knows its tensor.

    source: the adapter's name for the parameter. target: the checkpoint's. transposed: the
    tensor is stored (in, out). weight: what the user multiplies the update with. adapter: which
    of the adapters it comes from, counted from 0. places: where an update meets only a part of the
    tensor, or only a part of it does (split and fused projections): for each row of the target's
    module the row of the update's that it takes, or −1. member: which matrix of a stack of them
    (experts fused into one tensor).
    """

    source: str
    target: str
    update: Update
    transposed: bool = False
    weight: float = 1.0
    adapter: int = 0
    places: tuple[int, ...] | None = None
    member: int | None = None

    def describe(self) -> str:
        text = self.update.describe(self.weight)
        if self.places is not None:
            rows = sum(place >= 0 for place in self.places)
            text += f" on {rows} of {counted(len(self.places), 'row')}"
        if self.member is not None:
            text += f" of matrix {self.member}"
        return text + (", transposed" if self.transposed else "")


def describe(updates: Sequence[PlacedUpdate]) -> str:
    """What is done to one tensor, in a few words."""
    members = {update.member for update in updates} - {None}
    if len(members) > 1:
        matrices = counted(len(members), "matrix", "matrices")
        return f"{updates[0].update.describe(updates[0].weight)} on {matrices}"
    return " + ".join(update.describe() for update in updates)


class TieChoice(StrEnum):
    """What becomes of a tied embedding and head of which an adapter changes one.

    REFUSE: an error. BOTH: the other changes as well. APART: they are stored apart from then on.
    """

    REFUSE = "refuse"
    BOTH = "both"
    APART = "apart"


@dataclass(frozen=True)
class Placement:
    """All updates by checkpoint tensor, in the order of their adapters.

    notes: guesses made. added: updates of biases that the base does not have, by the name that
    they would be stored under; they start from zero. untied: a name to be stored beside the one
    that it was tied to and starts from. grown: rows of tables that get tokens.
    """

    updates: dict[str, tuple[PlacedUpdate, ...]]
    base_copies: dict[str, tuple[LazyTensor, ...]]
    notes: tuple[str, ...]
    added: dict[str, tuple[PlacedUpdate, ...]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    grown: dict[str, int] = field(default_factory=dict)
