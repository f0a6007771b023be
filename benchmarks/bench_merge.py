"""Merging: ``cp`` and sync as the floor, ``loratool merge``, and PEFT, in turns on a warm cache."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from measure import Run, loratool, median, note, python, read_once, run


def compare_merges(pair: Path, rounds: int) -> dict[str, Any]:
    """Medians over ``rounds``; ratios are taken within a round, then their median."""
    base, adapter, out = pair / "base", pair / "adapter", pair / "out"
    read_once(pair / "base")
    read_once(pair / "adapter")
    commands: dict[str, tuple[list[str | Path], Path | None]] = {
        "cp": (["cp", "-r", base, out], out),
        "loratool": (loratool("merge", base, adapter, "-o", out, "--device", "cpu", "-q"), None),
        "in_process": (python("in_process.py", "merge", base, adapter, out), None),
        "peft": (python("peft_merge.py", base, adapter, out), out),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, (command, flush) in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            done = run(command, flush=flush)
            runs[name].append(done)
            note(f"merge {number + 1}/{rounds} {name}: {done.seconds:.2f} s")
    shutil.rmtree(out, ignore_errors=True)
    inner = [done.json() for done in runs["in_process"]]
    return {
        "bytes": sum(f.stat().st_size for f in base.glob("*.safetensors")),
        "rounds": rounds,
        **{
            name: {
                "seconds": median(done.seconds for done in runs[name]),
                "cpu_seconds": median(done.cpu_seconds for done in runs[name]),
                "peak_bytes": median(done.peak_bytes for done in runs[name]),
                "anonymous_bytes": median(done.anonymous_bytes for done in runs[name]),
            }
            for name in ("cp", "loratool", "peft")
        },
        "in_process_seconds": median(one["plan"] + one["run"] for one in inner),
        "over_cp": _ratio(runs["loratool"], runs["cp"]),
        "in_process_over_cp": median(
            (one["plan"] + one["run"]) / cp.seconds
            for one, cp in zip(inner, runs["cp"], strict=True)
        ),
        "peft_in_process_seconds": median(done.json()["run"] for done in runs["peft"]),
        "in_process_peft_over_ours": median(
            theirs.json()["run"] / (one["plan"] + one["run"])
            for one, theirs in zip(inner, runs["peft"], strict=True)
        ),
        "peft_over_ours": _ratio(runs["peft"], runs["loratool"]),
        "peak_share": median(
            ours.peak_bytes / theirs.peak_bytes
            for ours, theirs in zip(runs["loratool"], runs["peft"], strict=True)
        ),
    }


def _ratio(above: list[Run], below: list[Run]) -> float:
    return median(a.seconds / b.seconds for a, b in zip(above, below, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path, help="a folder made by make_pair.py")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(compare_merges(given.pair, given.rounds), indent=1))


if __name__ == "__main__":
    main()
