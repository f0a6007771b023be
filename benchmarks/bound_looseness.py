"""How far the bound on the excess lies above the true excess, over hundreds of matrices.

The matrices are those of the tests: many decays, shapes and scales. The optimum comes from full
SVDs in float64. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loratool.algebra import factorize as module
from loratool.algebra.certificate import NEGLIGIBLE
from loratool.algebra.factorize import factorize, residual_norm
from loratool.algebra.ranks import parse_rank_rule
from tests.algebra.matrices import RANKS, cases

TOLERANCE = 1e-9
"""Rounding of the reference."""

MEASURABLE = 1e-5
"""Excess below which a ratio says nothing: float32's own rounding."""


def looseness() -> dict[str, Any]:
    """Claims, violations, and quantiles of the bound and of its ratio to the truth."""
    module.EXACT_SIDE = 16  # small matrices by the method for large ones
    bounds, ratios, violations = [], [], 0
    for case in cases():
        d = case.matrix()
        values = torch.linalg.svdvals(d.double())
        norm = float(values.norm())
        for rank in RANKS:
            factors = factorize(d, parse_rank_rule(str(rank)), key=case.name)
            best = float(values[rank:].norm())
            missed = residual_norm(d, factors.low_rank())
            excess = (missed - best) / (best if best >= NEGLIGIBLE * norm else norm)
            violations += excess > factors.bound.excess + TOLERANCE
            bounds.append(factors.bound.excess)
            if excess >= MEASURABLE:
                ratios.append(factors.bound.excess / excess)
    return {
        "claims": len(bounds),
        "violations": violations,
        "bounds": _quantiles(bounds),
        "measurable": len(ratios),
        "ratios": _quantiles(ratios),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64).sort().values
    return {
        "median": float(ordered.quantile(0.5)),
        "nine_in_ten": float(ordered.quantile(0.9)),
        "largest": float(ordered[-1]),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(looseness(), indent=1))


if __name__ == "__main__":
    main()
