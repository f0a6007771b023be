"""The LoRA authors' own MNLI adapter, into a RoBERTa-base of the right shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import loratool as lt
from loratool.errors import UsageError
from loratool.ops.inspect import AdapterReport

ALPHA = 16.0  # the authors' training script; the file does not say


@pytest.fixture
def published(shared_data: Path) -> Path:
    return shared_data / "roberta_base_lora_mnli.bin"


def test_alpha_is_asked_for(published: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not store alpha") as caught:
        lt.inspect(published)
    assert "--alpha" in (caught.value.hint or "")


def test_inspect(published: Path) -> None:
    report = lt.inspect(published, alpha=ALPHA)
    assert isinstance(report, AdapterReport)
    assert report.format == "loralib"
    assert len(report.rows) == 24
    assert {(row.rank, row.scale, row.shape) for row in report.rows} == {(8, 2.0, (768, 768))}
    assert sum(row.rank * sum(row.shape) for row in report.rows) == 294_912
    assert sum(torch.Size(r["shape"]).numel() for r in report.replaced) == 592_899
    original = torch.load(published, weights_only=True, map_location="cpu")
    for row in report.rows:
        module = row.name.removesuffix(".weight")
        delta = 2.0 * original[f"{module}.lora_B"].double() @ original[f"{module}.lora_A"].double()
        values = torch.linalg.svdvals(delta)[:8]
        assert torch.allclose(torch.tensor(row.values, dtype=torch.float64), values, rtol=1e-6)
        assert row.norm == pytest.approx(delta.norm().item(), rel=1e-9)


def test_all_updates_land(published: Path, tmp_path: Path) -> None:
    """Each update is loralib's (lora_B @ lora_A) · alpha / r, on the weight of its own module."""
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(vocab_size=200, num_labels=3))
    base.save_pretrained(tmp_path / "base")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    report = lt.merge(tmp_path / "base", published, tmp_path / "merged", alpha=ALPHA)
    assert report.facts["adapter_format"] == "loralib"
    merged = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged").state_dict()
    original = torch.load(published, weights_only=True, map_location="cpu")
    landed = 0
    for name, value in merged.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in original:
            a, b = original[f"{module}.lora_A"], original[f"{module}.lora_B"]
            exact = before[name].double() + (ALPHA / 8) * (b.double() @ a.double())
            assert torch.equal(value, exact.float())
            landed += 1
        elif name in original:
            assert torch.equal(value, original[name])
        else:
            assert torch.equal(value, before[name])
    assert landed == 24
    assert len(report.rows) == 28  # with the classifier's four tensors


def test_a_base_without_the_head_is_refused_by_name(published: Path, tmp_path: Path) -> None:
    bare = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=200, num_labels=3, num_hidden_layers=12)
    ).roberta
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(lt.LoratoolError, match="4 of the adapter's 28 updates") as caught:
        lt.merge(tmp_path / "bare", published, tmp_path / "merged", alpha=ALPHA)
    assert any("classifier.dense.weight" in detail for detail in caught.value.details)
    report = lt.merge(
        tmp_path / "bare", published, tmp_path / "merged", alpha=ALPHA, exclude=["classifier"]
    )
    assert len(report.rows) == 24
    assert "'roberta.' was removed" in report.facts["notes"][0]
