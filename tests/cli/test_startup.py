"""What the installed command puts off comes when it is asked for, and changes no result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loratool.cli.startup import DEFERRED
from tests.builders import llama_weights, random_tensor, write_checkpoint
from tests.cli.invoke import invoke

PUT_OFF = f"""
import sys
from loratool.cli.startup import start_sooner
start_sooner()
import torch
name = {DEFERRED!r}
module = sys.modules[name]
assert type(module).__name__ == "_Deferred", "torch ran it"
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_module_is_put_off_until_something_in_it_is_wanted():
    python(
        PUT_OFF
        + """
known = module.register_meta  # runs it
assert type(module).__name__ == "module" and callable(known)
import importlib
assert importlib.import_module(name) is module
"""
    )


def test_tensors_without_values_work_before_and_after():
    python(
        PUT_OFF
        + """
empty = torch.empty(3, 4, dtype=torch.bfloat16, device="meta")
assert empty.T.shape == (4, 3) and empty.dtype == torch.bfloat16
assert type(module).__name__ == "_Deferred", "loratool needs it after all"
module.register_meta
assert (empty @ torch.empty(4, 5, dtype=torch.bfloat16, device="meta")).shape == (3, 5)
"""
    )


def test_what_is_not_there_is_said_as_ever():
    python(
        PUT_OFF
        + """
try:
    module.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise SystemExit("found nonsense")
"""
    )


def test_the_installed_command_writes_the_same_bytes(tmp_path: Path):
    weights = llama_weights()
    base = write_checkpoint(tmp_path / "base", weights)
    tuned = write_checkpoint(
        tmp_path / "tuned",
        {
            name: w + 0.01 * random_tensor(*w.shape, seed=1) if "proj" in name else w
            for name, w in weights.items()
        },
    )
    options = [str(base), str(tuned), "--rank", "4", "-o"]
    assert invoke("extract", *options, tmp_path / "here").code == 0
    start = "from loratool.cli.main import entry; entry()"
    python(start, "extract", *options, str(tmp_path / "there"))
    here, there = (tmp_path / name / "adapter_model.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
