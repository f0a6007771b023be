"""What a PEFT user runs to merge: load, merge_and_unload, save_pretrained. BASE ADAPTER OUTPUT.

Prints JSON: seconds of that, with imports done before and the output flushed.
"""

import json
import sys
import time
from pathlib import Path

from measure import flush_files
from peft import PeftModel
from transformers import LlamaForCausalLM


def main() -> None:
    base, adapter, output = sys.argv[1:]
    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
    flush_files(Path(output))
    print(json.dumps({"run": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
