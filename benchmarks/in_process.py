"""Time ``merge BASE ADAPTER OUTPUT`` or ``extract BASE TUNED OUTPUT`` without start-up.

Prints JSON: seconds in the plan and in the run, with imports done before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from loratool.ops.extract import run_extract
from loratool.ops.extract_plan import plan_extract
from loratool.ops.merge import plan_merge, run_merge


def main() -> None:
    command, *paths = sys.argv[1:]
    first, second, output = map(Path, paths)
    start = time.perf_counter()
    if command == "merge":
        merge = plan_merge(first, [(second, 1.0)], output, device="cpu")
        planned = time.perf_counter()
        run_merge(merge)
    else:
        extract = plan_extract(first, second, output, rank=16, device="cpu")
        planned = time.perf_counter()
        run_extract(extract)
    over = time.perf_counter()
    print(json.dumps({"plan": planned - start, "run": over - planned}))


if __name__ == "__main__":
    main()
