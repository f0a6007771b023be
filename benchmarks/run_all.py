"""Measure everything and print it as Markdown; ``--write`` makes docs/benchmarks.md of it.

``--quick`` uses small models and few rounds, to see that the scripts work. ``--from-json``
renders results measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_extract import LARGEST, SHAPES, compare_errors, compare_times, usable_cores
from bench_extract import whole_command as extract_whole
from bench_memory import peaks
from bench_merge import compare_merges
from bench_mergekit import compare as compare_with_mergekit
from bench_pissa import compare_pissa
from measure import HERE, WORK, note, python, run
from receipt_cost import receipt_costs
from report import markdown

STAGES = (
    "merge",
    "merge_large",
    "extract_times",
    "extract_errors",
    "extract_bounds",
    "extract_whole",
    "extract_mergekit",
    "spectra",
    "memory",
    "receipt",
    "combine",
    "pissa",
)
PACKAGES = ("loratool", "torch", "llvmlite", "safetensors", "peft", "transformers")
DOCS = HERE.parent / "docs" / "benchmarks.md"


def measure(
    file: Path, stages: Sequence[str], *, rounds: int, quick: bool, largest: bool
) -> dict[str, Any]:
    """Measure ``stages``, adding each to ``file`` as soon as it is known; all results in it."""
    shapes: tuple[tuple[int, int], ...]
    if quick:
        models = [(1024, 2816, layers, 8000) for layers in (1, 2)]
        largest_model = (1024, 2816, 3, 8000)
        rival_models = [(768, 2048, 1, 2000)]
        shapes, error_shape = ((1024, 1024),), (1024, 1024)
        to_start = (512, 1024, 1, 1000)
    else:
        models = [(2048, 5632, layers, 32000) for layers in (4, 8, 16)]
        largest_model = (2048, 5632, 40, 32000)
        rival_models = [(2048, 5632, 4, 32000), (2048, 5632, 16, 32000), (4096, 11008, 1, 2000)]
        shapes, error_shape = SHAPES, (2048, 2048)
        to_start = (4096, 11008, 4, 2000)
    work: dict[str, Callable[[], Any]] = {
        "merge": lambda: compare_merges(_pair(*models[1]), rounds),
        "merge_large": lambda: compare_merges(
            _pair(*largest_model, "--without-tuned"), min(rounds, 3)
        ),
        "extract_times": lambda: compare_times(
            (*shapes, LARGEST) if largest else shapes, min(rounds, 3)
        ),
        "extract_errors": lambda: compare_errors(error_shape),
        "extract_bounds": lambda: run(python("bound_looseness.py")).json(),
        "extract_mergekit": lambda: [
            compare_with_mergekit(_pair(*model), 32, min(rounds, 3)) for model in rival_models
        ],
        "extract_whole": lambda: extract_whole(_pair(*models[1]), min(rounds, 3)),
        "combine": lambda: run(python("bench_combine.py", *(["--quick"] if quick else []))).json(),
        "spectra": lambda: run(
            python("pair_spectra.py", _pair(*models[1]), "--rounds", str(min(rounds, 3)))
        ).json(),
        "memory": lambda: peaks([_pair(*model) for model in models], min(rounds, 3)),
        "receipt": receipt_costs,
        "pissa": lambda: compare_pissa(_pair(*to_start, "--decaying"), min(rounds, 3)),
    }
    run([sys.executable, "-m", "compileall", "-q", HERE.parent / "loratool"])  # as pip would
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for stage in stages:
        before = os.getloadavg()[0]
        results[stage] = work[stage]()
        results.setdefault("load", {})[stage] = max(before, os.getloadavg()[0])
        results.update(machine=machine(), quick=quick)
        file.write_text(json.dumps(results, indent=1))
    return results


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _pair(hidden: int, intermediate: int, layers: int, vocabulary: int, *flags: str) -> Path:
    folder = WORK / f"{hidden}x{layers}{'-decaying' * ('--decaying' in flags)}"
    note(f"making {folder.name}")
    sizes = {
        "--hidden": hidden,
        "--intermediate": intermediate,
        "--layers": layers,
        "--vocabulary": vocabulary,
    }
    words = [str(word) for pair in sizes.items() for word in pair]
    run([*python("make_pair.py", folder), *words, *flags])
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, one round")
    parser.add_argument("--largest", action="store_true", help="also a 4096×11008 matrix")
    parser.add_argument("--rounds", type=int, help="of merge; at most 3 elsewhere [5]")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="measure these anew, keep others")
    parser.add_argument("--from-json", type=Path, help="render these results, measure nothing")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCS.name}")
    given = parser.parse_args()
    if given.quick and given.write:
        parser.error("--quick results do not go into the docs")
    if given.from_json:
        results = json.loads(given.from_json.read_text())
    else:
        WORK.mkdir(exist_ok=True)
        file = WORK / ("quick.json" if given.quick else "results.json")
        if not given.only:
            file.unlink(missing_ok=True)
        rounds = given.rounds or (1 if given.quick else 5)
        results = measure(
            file, given.only or STAGES, rounds=rounds, quick=given.quick, largest=given.largest
        )
    if missing := [stage for stage in STAGES if stage not in results]:
        note(f"not measured: {', '.join(missing)}")
    text = markdown(results)
    print(text)
    if given.write:
        DOCS.write_text(text)


if __name__ == "__main__":
    main()
