"""Extraction against mergekit-extract-lora: same pair, same ranks, the same tensors factorised.

mergekit lives in a virtual environment of its own, made on the first run with this environment's
versions of torch and transformers. Both commands are measured whole, imports included, and end
with their output on the disk. By default mergekit factorises the linear layers and stores the
embedding, the head and the norms whole, so loratool is told to do that too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import WORK, Run, loratool, median, note, python, read_once, run

MERGEKIT = "mergekit==0.1.5"
ENVIRONMENT = WORK / "mergekit"
WHOLE = ("embed_tokens", "lm_head")


def install() -> Path:
    """The folder of mergekit's executables; makes its environment where it is missing."""
    binaries = ENVIRONMENT / "bin"
    if not (binaries / "mergekit-extract-lora").exists():
        note(f"installing {MERGEKIT} into {ENVIRONMENT.name}")
        run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT])
        torch = f"torch=={version('torch').partition('+')[0]}"
        transformers = f"transformers=={version('transformers')}"
        run([binaries / "python", "-m", "pip", "install", "-q", torch, transformers, MERGEKIT])
    return binaries


def compare(pair: Path, rank: int, rounds: int) -> dict[str, Any]:
    """One run of mergekit's command amid ``rounds`` runs of ours; medians of ours.

    Before and after, since a machine's speed changes over minutes.
    """
    binaries = install()
    base, tuned, theirs, ours = (pair / name for name in ("base", "tuned", "theirs", "ours"))
    read_once(base)
    read_once(tuned)
    runs = _our_runs(base, tuned, ours, rank, (rounds + 1) // 2)
    shutil.rmtree(theirs, ignore_errors=True)
    rival = _run_mergekit(binaries, base, tuned, theirs, rank)
    note(f"mergekit: theirs {pair.name}: {rival.seconds:.1f} s, exit code {rival.exit_code}")
    runs += _our_runs(base, tuned, ours, rank, rounds // 2)
    errors = run(python("adapter_error.py", base, tuned, ours, theirs)).json()
    floor = run(python("extract_floor.py", base, tuned, str(rank))).json()
    shapes = run(python("worker_shapes.py", base, tuned, str(rank))).json()
    config = json.loads((base / "config.json").read_text())
    result = {
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "bytes": sum(
            f.stat().st_size for side in (base, tuned) for f in side.glob("*.safetensors")
        ),
        "rank": rank,
        "rounds": rounds,
        "versions": _versions(binaries),
        "theirs": _figures([rival]) | errors["theirs"] | {"exit_code": rival.exit_code},
        "ours": _figures(runs) | errors["ours"],
        "stages": runs[-1].json()["seconds"],
        "floor": floor,
        "worker_shapes": shapes,
    }
    for folder in (ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _our_runs(base: Path, tuned: Path, out: Path, rank: int, count: int) -> list[Run]:
    runs = []
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        runs.append(run(_our_command(base, tuned, out, rank)))
        note(f"mergekit: ours {out.parent.name}: {runs[-1].seconds:.1f} s")
    return runs


def _our_command(base: Path, tuned: Path, out: Path, rank: int) -> list[str | Path]:
    whole = [word for name in WHOLE for word in ("--rank-for", f"{name}=whole")]
    options = ["-o", out, "--rank", str(rank), "--device", "cpu", "-q", "--json", *whole]
    return loratool("extract", base, tuned, *options)


def _run_mergekit(binaries: Path, base: Path, tuned: Path, out: Path, rank: int) -> Run:
    """Without a network it may fail at its last step, a model card; the adapter is there then."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    command = [binaries / "mergekit-extract-lora", "--model", tuned, "--base-model", base]
    command += ["--out-path", out, "--max-rank", str(rank)]
    return run(command, flush=out, enough=out / "adapter_model.safetensors")


def _figures(runs: list[Run]) -> dict[str, float]:
    return {
        "seconds": median(done.seconds for done in runs),
        "cpu_seconds": median(done.cpu_seconds for done in runs),
        "peak_bytes": median(done.peak_bytes for done in runs),
    }


def _versions(binaries: Path) -> dict[str, str]:
    names = ("mergekit", "torch", "transformers")
    ask = "import json; from importlib.metadata import version; "
    ask += f"print(json.dumps({{name: version(name) for name in {names!r}}}))"
    versions: dict[str, str] = run([binaries / "python", "-c", ask]).json()
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path, help="a folder made by make_pair.py")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of ours")
    given = parser.parse_args()
    print(json.dumps(compare(given.pair, given.rank, given.rounds), indent=1))


if __name__ == "__main__":
    main()
