"""Less common forms of adapters that extract writes: PEFT computes what loratool merges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratool as lt
from tests.interop.families import FAMILIES
from tests.interop.test_families import answer, load, save_pair, under_peft

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert masked"])
def test_continued_adapters(name: str, tmp_path: Path) -> None:
    """Linear, Conv1D and embeddings, from an adapter of another scale."""
    family = FAMILIES[name]
    base, tuned = save_pair(family, tmp_path)
    lt.extract(base, tuned, tmp_path / "first", rank=2)
    config = tmp_path / "first" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 3'))
    lt.extract(base, tuned, tmp_path / "adapter", rank=3, into=tmp_path / "first")
    updates = lt.open_adapter(tmp_path / "adapter").low_rank
    assert {update.rank for update in updates.values()} == {5}
    assert {update.scale for update in updates.values()} == {1.5}
    lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = answer(family, load(family, tmp_path / "merged"))
    peft = answer(family, under_peft(family, base, tmp_path / "adapter"))
    torch.testing.assert_close(peft, merged, **CLOSE)
