"""The methods, in the order in which they are listed."""

from __future__ import annotations

from loratool.combine.cat import cat
from loratool.combine.linear import linear
from loratool.combine.method import Method, Parameter
from loratool.combine.svd import svd
from loratool.combine.task_arithmetic import task_arithmetic
from loratool.combine.ties import ties
from loratool.errors import UsageError

METHODS: dict[str, Method] = {
    known.name: known for known in (svd, cat, linear, task_arithmetic, ties)
}
DEFAULT = svd.name


def find_method(name: str) -> Method:
    """The method of that name. Raises UsageError naming the choices."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", hint=f"choose one of {', '.join(METHODS)}")
    return METHODS[name]


def parameters() -> dict[str, list[tuple[Method, Parameter]]]:
    """Parameter name → every method that has it, with its own form of it."""
    found: dict[str, list[tuple[Method, Parameter]]] = {}
    for known in METHODS.values():
        for parameter in known.parameters:
            found.setdefault(parameter.name, []).append((known, parameter))
    return found
