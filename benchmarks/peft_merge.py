"""What a PEFT user runs to merge: load, merge_and_unload, save_pretrained. BASE ADAPTER OUTPUT."""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    base, adapter, output = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


if __name__ == "__main__":
    main()
