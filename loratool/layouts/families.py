"""Names of parameters taken apart: which layer, and what it is called in every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, TypeVar

_LAYER = re.compile(r"\.(\d{1,9})\.")
_NUMBER = re.compile(r"(\d{1,18})")

Named = TypeVar("Named", bound="HasName")


class HasName(Protocol):
    """A row about something that has a name."""

    @property
    def name(self) -> str: ...


def natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """A key by which names are sorted for people: numbers by value, letters whatever their case."""
    parts = _NUMBER.split(name)
    return tuple(int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)), name


def by_name(rows: Iterable[Named]) -> list[Named]:
    """Rows in the ``natural`` order of their names."""
    return sorted(rows, key=lambda row: natural(row.name))


def layer_of(name: str) -> int | None:
    """The first number among a name's components: the layer."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


def family_of(name: str) -> str:
    """A parameter's name with its numbers starred: what it is called in every layer."""
    return _LAYER.sub(".*.", f".{name}.").strip(".")


def without_common_start(families: Iterable[str]) -> dict[str, str]:
    """``model.layers.*.mlp.up_proj`` → ``mlp.up_proj``, where all begin alike."""
    names = list(families)
    start = names[0].partition("*.")[0] + "*." if names else ""
    shared = all(name.startswith(start) for name in names)
    return {name: name.removeprefix(start) if shared else name for name in names}
