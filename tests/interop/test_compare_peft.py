"""compare on adapters that PEFT initialised and trained: same and different seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import loratool as lt
from loratool.algebra.initial import Start
from tests.interop.conftest import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def trained(folder: Path, *, seed: int, data: int, rank: int = 8, init: object = True) -> Path:
    """A few optimiser steps from PEFT's own initialisation."""
    torch.manual_seed(0)
    model = llama()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        init_lora_weights=init,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    adapted = get_peft_model(model, config)
    chosen = [value for value in adapted.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=2e-3)
    generator = torch.Generator().manual_seed(data)
    for _ in range(4):
        tokens = torch.randint(0, 96, (4, 16), generator=generator)
        logits = adapted(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_one_seed_two_texts(tmp_path: Path, init: object) -> None:
    first = trained(tmp_path / "a", seed=1, data=1, init=init)
    second = trained(tmp_path / "b", seed=1, data=2, init=init)
    (pair,) = lt.compare([first, second]).pairs
    assert pair.start is not None
    assert pair.start.start is Start.SHARED
    assert pair.start.distance < 0.3
    assert pair.phi_a.whole == pytest.approx(1.0, abs=0.05)


def test_two_seeds_one_text(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", seed=1, data=1)
    second = trained(tmp_path / "b", seed=2, data=1)
    report = lt.compare([first, second])
    (pair,) = report.pairs
    assert pair.start is not None
    assert pair.start.start is Start.INDEPENDENT
    assert pair.start.distance == pytest.approx(2**0.5, abs=0.1)
    assert pair.phi_right_chance is not None
    assert pair.phi_a.whole is not None
    assert pair.phi_a.whole < 2.5 * pair.phi_right_chance


def test_two_ranks(tmp_path: Path) -> None:
    """The paper's figure is between ranks; a common start cannot be asked for there."""
    first = trained(tmp_path / "a", seed=1, data=1, rank=4)
    (pair,) = lt.compare([first, trained(tmp_path / "b", seed=1, data=1, rank=8)]).pairs
    assert pair.start is None
    assert (pair.phi_a.i, pair.phi_a.j) == ((1, 2, 4), (1, 2, 4, 8))
