"""Names of parameters taken apart: which layer, and what it is called in every layer."""

from __future__ import annotations

import re

_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The first number among a name's components: the layer."""
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


def family_of(name: str) -> str:
    """A parameter's name with its numbers starred: what it is called in every layer."""
    return _LAYER.sub(".*.", f".{name}.").strip(".")
