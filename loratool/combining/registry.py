"""The methods, in the order in which they are listed."""

from __future__ import annotations

from loratool.combining.breadcrumbs import breadcrumbs
from loratool.combining.cat import cat
from loratool.combining.core_space import in_core_space
from loratool.combining.ctm import ctm
from loratool.combining.dare_linear import dare_linear
from loratool.combining.dare_ties import dare_ties
from loratool.combining.della import della
from loratool.combining.iso_c import iso_c
from loratool.combining.iso_cts import iso_cts
from loratool.combining.karcher import karcher
from loratool.combining.knots_ties import knots_ties
from loratool.combining.linear import linear
from loratool.combining.magnitude_prune import magnitude_prune
from loratool.combining.method import Method, Parameter
from loratool.combining.model_stock import model_stock
from loratool.combining.multislerp import multislerp
from loratool.combining.nearswap import nearswap
from loratool.combining.nuslerp import nuslerp
from loratool.combining.pico import pico
from loratool.combining.sce import sce
from loratool.combining.slerp import slerp
from loratool.combining.svc import svc
from loratool.combining.svd import svd
from loratool.combining.task_arithmetic import task_arithmetic
from loratool.combining.ties import ties
from loratool.combining.tsv_m import tsv_m
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
