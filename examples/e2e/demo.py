"""The main job on the example pair, through the command line, with what each step keeps.

    python examples/e2e/demo.py

Extracts adapters of several ranks from base/ and tuned/, merges each into base/ again, and
measures every model on lines that none of them was trained on. Nothing here is stored: the
numbers are computed as you watch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from evaluate import HELDOUT, bits_per_byte, read_lines

HERE = Path(__file__).resolve().parent
RANKS = ("1", "4", "16", "64")


def loratool(folder: Path, command: str) -> None:
    """Run a loratool command in ``folder`` as a user would, and show it."""
    print(f"$ loratool {command}", flush=True)
    words = [sys.executable, "-m", "loratool", *command.split(), "--quiet"]
    subprocess.run(words, cwd=folder, check=True)


def size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Print the table."""
    lines = read_lines(HELDOUT)
    base, tuned = HERE / "base", HERE / "tuned"
    print(f"held-out text: {len(lines)} lines that no model here was trained on\n")
    start, goal = bits_per_byte(base, lines), bits_per_byte(tuned, lines)
    rows = [("base model", size(base), "", start), ("fine-tuned model", size(tuned), "", goal)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "base").symlink_to(base)
        (work / "tuned").symlink_to(tuned)
        for rank in RANKS:
            loratool(work, f"extract base tuned -o adapter-r{rank} --rank {rank}")
            loratool(work, f"merge base adapter-r{rank} -o merged-r{rank}")
            report = json.loads((work / f"adapter-r{rank}" / "loratool_report.json").read_text())
            kept = f"{100 * report['totals']['energy_kept']:.1f} %"
            loss = bits_per_byte(work / f"merged-r{rank}", lines)
            rows.append(
                (f"base + adapter, rank {rank}", size(work / f"adapter-r{rank}"), kept, loss)
            )
    print()
    print(
        f"{'model':<26}{'file size':>12}{'change kept':>14}{'bits per byte':>16}{'gain kept':>12}"
    )
    for name, nbytes, kept, loss in rows:
        gain = (start - loss) / (start - goal)
        print(f"{name:<26}{nbytes / 1000:>9,.0f} kB{kept:>14}{loss:>16.3f}{100 * gain:>10.0f} %")
    print(
        "\nbits per byte: how surprised the model is by the held-out text; lower is better."
        "\nchange kept: share of the squared size of tuned - base that the adapter holds."
        "\ngain kept: how far from base (0 %) to fine-tuned (100 %) the loss has come."
    )


if __name__ == "__main__":
    main()
