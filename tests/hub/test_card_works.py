"""What a card tells its reader to do, done: base and adapter come from the test Hub."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.hub_processes import Result, run
from tests.hub.hub_state import Hub

pytestmark = pytest.mark.slow

MAKE = """
import sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

folder = Path(sys.argv[1])
torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=32))
base.save_pretrained(folder / "base")
base = GPT2LMHeadModel.from_pretrained(folder / "base")
config = LoraConfig(
    task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True,
    init_lora_weights=False,
)
model = get_peft_model(base, config)
model.save_pretrained(folder / "adapter")
torch.save(model(torch.arange(8)[None]).logits.detach(), folder / "expected.pt")
"""
COMPARE = """
import sys, torch
expected = torch.load(sys.argv[1])
given = model(torch.arange(8)[None]).logits.detach()
assert torch.allclose(given, expected, atol=1e-5), (given - expected).abs().max()
"""


@pytest.fixture
def pushed(hub: Hub, environment: dict[str, str], tmp_path: Path) -> str:
    """The card of an adapter that PEFT made and loratool pushed."""
    made = run([sys.executable, "-c", MAKE, str(tmp_path)], environment)
    assert made.code == 0, made.err
    base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.add_repo("team/base", base).large.add("model.safetensors")
    command = [sys.executable, "-m", "loratool", "push", str(tmp_path / "adapter"), "alice/lora"]
    refused = run(command, environment)
    assert refused.code == 2, "PEFT recorded the folder as the base"
    done = run([*command, "--base-model", "team/base"], environment)
    assert done.code == 0, done.err
    assert not [
        data
        for data in hub.repos["alice/lora"].files.values()
        if b"/base" in data and str(tmp_path).encode() in data
    ]
    return hub.repos["alice/lora"].files["README.md"].decode()


def snippet(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_peft_snippet(pushed: str, python: Callable[..., Result], tmp_path: Path) -> None:
    assert "More Information" not in pushed
    result = python("-c", snippet(pushed, "python") + COMPARE, str(tmp_path / "expected.pt"))
    assert result.code == 0, result.err


def test_the_merge_snippet(
    pushed: str, python: Callable[..., Result], environment: dict[str, str], tmp_path: Path
) -> None:
    tools = Path(sys.executable).parent
    env = {**environment, "PATH": f"{tools}:{os.environ['PATH']}"}
    work = tmp_path / "work"
    work.mkdir()
    script = f"cd {work} && set -e\n{snippet(pushed, 'sh')}"
    merged = run(["bash", "-c", script], env)
    assert merged.code == 0, merged.err
    load = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(work / 'merged')!r})\n"
    )
    result = python("-c", load + COMPARE, str(tmp_path / "expected.pt"))
    assert result.code == 0, result.err
