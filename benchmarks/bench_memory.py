"""Peak memory of merge and extract against the number of layers: it should not grow."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import loratool, median, note, run


def peaks(pairs: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Median peak resident set of both commands for each pair, in turns."""
    seen: dict[tuple[Path, str], list[int]] = {}
    for number in range(rounds):
        for pair in pairs:
            for command, second in (("merge", "adapter"), ("extract", "tuned")):
                out = pair / "out"
                shutil.rmtree(out, ignore_errors=True)
                arguments = (pair / "base", pair / second, "-o", out, "--device", "cpu", "-q")
                done = run(loratool(command, *arguments))
                seen.setdefault((pair, command), []).append(done.peak_bytes)
                note(f"memory {number + 1}/{rounds} {pair.name} {command}")
                shutil.rmtree(out, ignore_errors=True)
    return [
        {
            "layers": json.loads((pair / "base/config.json").read_text())["num_hidden_layers"],
            "bytes": sum(f.stat().st_size for f in (pair / "base").glob("*.safetensors")),
            "merge_peak_bytes": median(seen[pair, "merge"]),
            "extract_peak_bytes": median(seen[pair, "extract"]),
        }
        for pair in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, nargs="+", help="folders made by make_pair.py")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(peaks(given.pairs, given.rounds), indent=1))


if __name__ == "__main__":
    main()
