"""The LoRA paper's tables beside ours: docs/paper.md.

    python benchmarks/paper_page.py --write

The paper's figures are constants here; ours are computed when the page is made. Adapters are
trained with PEFT on the base of the example pair. Needs PEFT, transformers and ../shared/data;
without the data it says so and ends.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import paper_estimates
import paper_latency
import paper_subspaces
import torch
from quality_combine import DATA, REPOSITORY

from loratool.layouts.architectures.paper import NAMED

PAGE = REPOSITORY / "docs" / "paper.md"


def page(work: Path) -> str:
    """The page. The paper's figures aside, every number in it was computed in this run."""
    parts = [
        "# The LoRA paper's tables beside ours",
        "Made by `python benchmarks/paper_page.py --write`: the paper's figures (Hu et al., LoRA, "
        "ICLR 2022) are quoted, ours computed when the page is made. "
        f"All {len(NAMED)} systems run through every command in `tests/systems`.",
        *paper_estimates.sections(),
        *paper_latency.sections(work),
        *paper_subspaces.sections(work),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description="The LoRA paper's tables beside ours.")
    parser.add_argument("--write", action="store_true", help=f"replace {PAGE.name}")
    write = parser.parse_args().write
    if not DATA.is_dir():
        sys.exit("needs ../shared/data (the E2E lines), which this checkout does not have")
    torch.set_num_threads(1)  # the models are small: threads would wait for each other
    with tempfile.TemporaryDirectory() as name:
        text = page(Path(name))
    if write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
