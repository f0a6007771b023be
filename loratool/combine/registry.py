"""The methods, in the order in which they are listed."""

from __future__ import annotations

from loratool.combine.breadcrumbs import breadcrumbs
from loratool.combine.cat import cat
from loratool.combine.core_space import in_core_space
from loratool.combine.ctm import ctm
from loratool.combine.dare_linear import dare_linear
from loratool.combine.dare_ties import dare_ties
from loratool.combine.della import della
from loratool.combine.iso_c import iso_c
from loratool.combine.iso_cts import iso_cts
from loratool.combine.karcher import karcher
from loratool.combine.knots_ties import knots_ties
from loratool.combine.linear import linear
from loratool.combine.magnitude_prune import magnitude_prune
from loratool.combine.method import Method, Parameter
from loratool.combine.model_stock import model_stock
from loratool.combine.multislerp import multislerp
from loratool.combine.nearswap import nearswap
from loratool.combine.nuslerp import nuslerp
from loratool.combine.pico import pico
from loratool.combine.sce import sce
from loratool.combine.slerp import slerp
from loratool.combine.svc import svc
from loratool.combine.svd import svd
from loratool.combine.task_arithmetic import task_arithmetic
from loratool.combine.ties import ties
from loratool.combine.tsv_m import tsv_m
from loratool.errors import UsageError

ELEMENTWISE = (ties, dare_linear, dare_ties, della, breadcrumbs, magnitude_prune, sce)
"""Rules on single elements, which have a second form in core space."""

METHODS: dict[str, Method] = {
    known.name: known
    for known in (
        svd,
        cat,
        linear,
        task_arithmetic,
        *ELEMENTWISE,
        slerp,
        nuslerp,
        multislerp,
        karcher,
        model_stock,
        nearswap,
        knots_ties,
        tsv_m,
        iso_c,
        iso_cts,
        svc,
        pico,
        ctm,
        *map(in_core_space, ELEMENTWISE),
    )
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
