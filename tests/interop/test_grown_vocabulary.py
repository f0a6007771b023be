"""Tokens added by the tuned side: what PEFT loads, on a base resized as for training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.adapter import Replacement, TokenRows
from loratool.errors import DisagreementError, NonFiniteValues, ShapeMismatch, UsageError
from tests.faults.killing import bytes_of
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


def load_table(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


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
    merge = lt.merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert any("grows from 64 to 71 tokens" in note for note in merge.to_json()["notes"])
    merged = load(family, tmp_path / "merged")
    assert merged.config.vocab_size == 71
    model = load(family, base)
    model.resize_token_embeddings(71, mean_resizing=False)
    peft = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    asked = Family(family.make, lambda: {"input_ids": torch.arange(50, 71).reshape(1, 21)})
    wanted = answer(asked, load(family, tuned))
    torch.testing.assert_close(answer(asked, peft), wanted, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(answer(asked, merged), wanted, rtol=1e-4, atol=2e-5)
    for table in TABLES[name]:
        assert torch.equal(*(load_table(folder, table) for folder in (tmp_path / "merged", tuned)))


@pytest.mark.parametrize("old_rows", ["changed", "unchanged"])
@pytest.mark.parametrize("name", TABLES)
def test_the_shorter_tables_come_back(name: str, old_rows: str, tmp_path: Path) -> None:
    base, _ = grown(FAMILIES[name], tmp_path, old_rows)
    lt.extract(base, tmp_path / "grown", tmp_path / "adapter", rank=2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    lt.merge(base, adapter, merged, receipt=True)
    assert lt.verify(merged, base, adapter).is_equal
    assert lt.verify(merged, None, adapter, fast=True).is_equal
    lt.unmerge(merged, adapter, tmp_path / "back")
    assert bytes_of(tmp_path / "back") == bytes_of(base)
    state = load_file(merged / "model.safetensors")
    state[TABLES[name][0]][-1, 0] += 1
    save_file(state, merged / "model.safetensors", {"format": "pt"})
    for fast in (False, True):
        report = lt.verify(merged, base, adapter, fast=fast)
        assert {r.name for r in report.rows if r.status != "equal"} == {TABLES[name][0]}


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


def test_growth_is_all_or_nothing(tmp_path: Path) -> None:
    """Tables of different lengths, a merge in place: none of them."""
    base, tuned = grown(FAMILIES["llama"], tmp_path, "unchanged")
    adapter = tmp_path / "adapter"
    lt.extract(base, tuned, adapter, rank=2)
    with pytest.raises(DisagreementError, match="adds tokens to some tables"):
        lt.merge(base, adapter, tmp_path / "m", exclude=["lm_head"])
    with pytest.raises(UsageError, match="would grow to 71 tokens"):
        lt.merge_in_place(base, adapter)
    holes = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in holes if "token_adapter" in key]:
        holes[key] = holes[key][1:].contiguous()
    save_file(holes, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for indices in config["trainable_token_indices"].values():
        del indices[0]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match="the adapter trained token 70, the base has 64"):
        lt.merge(base, adapter, tmp_path / "m")


def test_a_new_token_that_is_no_number(tmp_path: Path) -> None:
    base, tuned = grown(FAMILIES["llama"], tmp_path, "unchanged")
    state = load_file(tuned / "model.safetensors")
    state["lm_head.weight"][68, 3] = float("nan")
    save_file(state, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteValues, match=r"lm_head\.weight: NaN"):
        lt.extract(base, tuned, tmp_path / "adapter", rank=2)


def test_what_else_is_over_the_vocabulary(tmp_path: Path) -> None:
    """BART's bias of logits is no table: the refusal says what to do, and that works."""
    family = FAMILIES["bart"]
    base, tuned = grown(family, tmp_path, "changed")
    with pytest.raises(ShapeMismatch, match="in shape between") as caught:
        lt.extract(base, tuned, tmp_path / "a", rank=2)
    assert caught.value.details == ("final_logits_bias: base [1, 64], tuned [1, 71]",)
    assert "resize_token_embeddings(71), save_pretrained" in (caught.value.hint or "")
    model = load(family, base)
    model.resize_token_embeddings(71, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    lt.extract(tmp_path / "resized", tuned, tmp_path / "a", rank="full")
    with pytest.raises(DisagreementError, match="final_logits_bias of the base is no table"):
        lt.merge(base, tmp_path / "a", tmp_path / "merged")
    lt.merge(tmp_path / "resized", tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(
        answer(family, load(family, tmp_path / "merged")),
        answer(family, load(family, tuned)),
        rtol=1e-4,
        atol=2e-5,
    )
