"""Run mergekit's merge methods on the tests' small updates and keep what comes out.

    VENV/bin/python tests/combining/data/make_mergekit.py

from the top of the checkout, in an environment with mergekit 0.1.5 (benchmarks/bench_mergekit.py
makes one); loratool is not needed there. The random masks of DARE and DELLA are the tests' own:
``torch.bernoulli`` is replaced while mergekit runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from tests.combining import mergekit_cases, reference  # noqa: E402


@contextmanager
def own_masks() -> Iterator[None]:
    """``torch.bernoulli`` decides with the reference's numbers, one adapter after the other."""
    drawn, original = 0, torch.bernoulli

    def bernoulli(chances: Tensor) -> Tensor:
        nonlocal drawn
        numbers = reference.chances(chances.shape, drawn)
        drawn += 1
        return (numbers < chances.double()).to(chances.dtype)

    torch.bernoulli = bernoulli  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.bernoulli = original


def run(case: mergekit_cases.Case) -> Tensor:
    from mergekit.merge_methods.api import merge_tensors

    updates = mergekit_cases.matrices()[: len(case.weights)]
    given: dict[str, Any] = dict(case.given)
    weights = list(case.weights)
    tensors, base = list(updates), None
    if case.base == "zeros":
        tensors, base = [torch.zeros_like(updates[0]), *updates], 0
        weights = [1.0, *weights]
    elif case.base == "first":
        base = 0
    if case.theirs not in mergekit_cases.WEIGHTLESS:
        ids = range(len(tensors))
        own = [i for i in ids if case.base == "none" or i != base]
        given["weight"] = {i: weights[i] for i in own}
        if "density" in given:
            given["density"] = dict.fromkeys(own, given["density"])
        if "gamma" in given:
            given["gamma"] = dict.fromkeys(own, given["gamma"])
    with own_masks():
        return merge_tensors(tensors, case.theirs, parameters=given, base_index=base)


def della_mask() -> Tensor:
    """Which elements of the first update mergekit's DELLA keeps."""
    from mergekit.sparsify import SparsificationMethod, sparsify

    update = mergekit_cases.matrices()[0]
    with own_masks():
        kept = sparsify(
            update, density=0.5, epsilon=0.25, method=SparsificationMethod.della_magprune
        )
    return (kept != 0).to(torch.uint8)


def main() -> None:
    results = {case.name: run(case).float() for case in mergekit_cases.CASES}
    results["della_mask"] = della_mask()
    save_file(results, HERE / mergekit_cases.FILE, {"mergekit": version("mergekit")})


if __name__ == "__main__":
    main()
