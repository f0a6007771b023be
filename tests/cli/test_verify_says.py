"""What is wrong with a merge, in the words of the command line and with its exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cli.invoke import invoke
from tests.ops.builders import LLAMA, llama_like, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors

FACTORS = {Q0: factors(24, 24), DOWN1: factors(24, 40)}
Merge = Callable[[str, Tensor, Tensor], Tensor]


CASES: dict[str, tuple[Merge, int, str]] = {
    "right": (lambda name, w, u: w.double() + u, 0, "equal: 13 tensors are as they should be"),
    "as PEFT rounds": (
        lambda name, w, u: w + u.bfloat16(),
        0,
        "2 tensors: rounded as if delta cast first, then added",
    ),
    "wrong scale": (
        lambda name, w, u: w.double() + u / 4,
        1,
        "all updated tensors: wrong scale; 0.2499 times the update fits",
    ),
    "a missing module": (
        lambda name, w, u: w if name == Q0 else w.double() + u,
        1,
        "1 of 2 updated tensors: the update is not in",
    ),
    "transposed": (
        lambda name, w, u: w.double() + (u.T if name == Q0 else u),
        1,
        "1 of 2 updated tensors: the update was added transposed",
    ),
    "twice": (
        lambda name, w, u: w.double() + 2 * u,
        1,
        "all updated tensors: the update was applied twice",
    ),
    "subtracted": (
        lambda name, w, u: w.double() - u,
        1,
        "all updated tensors: the update was subtracted",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(tmp_path: Path, case: str) -> None:
    merge, code, words = CASES[case]
    state = llama_like(torch.bfloat16)
    merged = dict(state)
    for module, (a, b) in FACTORS.items():
        weight = state[f"{module}.weight"]
        merged[f"{module}.weight"] = merge(module, weight, 2 * (b.double() @ a.double())).bfloat16()
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", FACTORS, lora_alpha=6)
    folder = save_folder(merged, tmp_path / "merged", LLAMA)
    ended = invoke("verify", folder, "--base", base, "--adapter", adapter)
    assert ended.code == code
    assert words in ended.out
    strict = invoke("verify", folder, "--base", base, "--adapter", adapter, "--exact", "-q")
    assert strict.code == (0 if case == "right" else 1)
