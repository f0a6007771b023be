"""``BASE TUNED ADAPTER…``: what each adapter's factors miss of the change, in float64.

Prints JSON: by the adapters' folder names, the number of matrices and √(Σ‖D − s·B·A‖² / Σ‖D‖²).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import residual_norm
from loratool.ops.sources import open_adapter, open_model


def main() -> None:
    base, tuned, *adapters = map(Path, sys.argv[1:])
    before, after = (open_model(side).checkpoint.tensors for side in (base, tuned))
    result = {}
    for path in adapters:
        missed = total = 0.0
        updates = open_adapter(path).low_rank
        for name, update in updates.items():
            delta = after[name].read().float() - before[name].read().float()
            missed += residual_norm(delta, update.load()) ** 2
            total += sum_of_squares(delta)
        result[path.name] = {"matrices": len(updates), "error": (missed / total) ** 0.5}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
