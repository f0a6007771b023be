"""The suggestion follows from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratool as lt
from tests.ops.builders import save_peft

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def vectors(count: int = 8, size: int = 40) -> Tensor:
    return torch.linalg.qr(torch.randn(size, count, generator=torch.Generator().manual_seed(1))).Q


E = vectors()
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
CASES: dict[str, tuple[Tensor, Tensor, str]] = {
    "linear": (E[:, :2], E[:, :2] + 0.1 * E[:, 2:4], "mean"),
    "ties": (E[:, :2], E[:, 2:4] - 0.3 * E[:, :2], "a sum keeps 70 % of one adapter"),
    "pico": (E[:, :2], E[:, 2:4] + 0.1 * E[:, :2], "(cosine 0.10), which a sum repeats"),
    "tsv_m": (E[:, :2], E[:, :2] @ TURN, "100 % of the energy"),
    "svd": (E[:, :2], E[:, 2:4], "fits into ranks up to 4"),
}


@pytest.mark.parametrize("method", CASES)
def test_each_rule(tmp_path: Path, method: str) -> None:
    """Updates bᵢ·aᵀ with a common a, so that what the columns of b do is what the updates do."""
    first, second, why = CASES[method]
    a = E[:, 4:6].T
    other = E[:, 6:8].T if method == "svd" else a
    paths = [
        save_peft(tmp_path / "one", {Q: (a, first)}),
        save_peft(tmp_path / "two", {Q: (other, second)}),
    ]
    advice = lt.compare(paths).advice
    assert advice is not None
    assert advice.method == method
    assert why in advice.why
    assert lt.compare(paths[::-1]).advice.method == method  # type: ignore[union-attr]


def test_a_duplicate_beside_another_adapter_is_no_case_for_a_mean(tmp_path: Path) -> None:
    a = E[:, 4:6].T
    one = save_peft(tmp_path / "one", {Q: (a, E[:, :2])})
    apart = save_peft(tmp_path / "apart", {V: (a, E[:, :2])})
    advice = lt.compare([one, one, apart]).advice
    assert advice is not None
    assert advice.method == "pico"


def test_nothing_changed_nothing_suggested(tmp_path: Path) -> None:
    zero = save_peft(tmp_path / "zero", {Q: (E[:, 4:6].T, torch.zeros(40, 2))})
    assert lt.compare([zero, zero]).advice is None
