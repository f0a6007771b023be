"""Tokens added by the tuned side: what PEFT loads, on a base resized as for training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import loratool as lt
from loratool.adapter import Replacement, TokenRows
from tests.interop.families import FAMILIES, Family
from tests.interop.test_families import answer, load, save_pair

TABLES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight",),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings", "ignore:.*is_gradient_checkpointing"
)


def grown(family: Family, folder: Path, old_rows: str) -> tuple[Path, Path]:
    """A pair whose tuned side has seven tokens more, all of them trained."""
    base, tuned = save_pair(family, folder)
    model = load(family, tuned)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = load(family, base)
    kept = [before.get_input_embeddings().weight, before.get_output_embeddings().weight]
    with torch.no_grad():
        if old_rows == "unchanged":
            for table, old in zip(tables, kept, strict=True):
                table.copy_(old)
    model.resize_token_embeddings(71, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[64:] = 0.3 * torch.randn(7, table.shape[1])
    model.save_pretrained(folder / "grown")
    return base, folder / "grown"


@pytest.mark.parametrize("old_rows", ["changed", "unchanged"])
@pytest.mark.parametrize("name", TABLES)
def test_the_adapter_on_the_resized_base_is_the_tuned_model(
    name: str, old_rows: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    base, tuned = grown(family, tmp_path, old_rows)
    report = lt.extract(base, tuned, tmp_path / "adapter", rank="full")
    assert any("resize_token_embeddings(71)" in note for note in report.notes)
    rows = {row.name: row for row in report.rows}
    adapter = lt.open_adapter(tmp_path / "adapter")
    for table in TABLES[name]:
        assert rows[table].added_rows == 7
        update = adapter.updates[table]
        if old_rows == "unchanged":
            assert isinstance(update, TokenRows)
            assert update.indices == tuple(range(64, 71))
        else:
            assert isinstance(update, Replacement)
    model = load(family, base)
    model.resize_token_embeddings(71, mean_resizing=False)
    peft = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    asked = Family(family.make, lambda: {"input_ids": torch.arange(50, 71).reshape(1, 21)})
    torch.testing.assert_close(
        answer(asked, peft), answer(asked, load(family, tuned)), rtol=1e-4, atol=2e-5
    )


def test_only_new_tokens(tmp_path: Path) -> None:
    """Nothing else changed: the adapter holds their rows and nothing else."""
    family = FAMILIES["llama"]
    base, _ = save_pair(family, tmp_path)
    model = load(family, base)
    model.resize_token_embeddings(66)
    model.save_pretrained(tmp_path / "grown")
    report = lt.extract(base, tmp_path / "grown", tmp_path / "adapter")
    assert report.adapter_parameters == 2 * 2 * 32
    assert report.relative_error == 0
