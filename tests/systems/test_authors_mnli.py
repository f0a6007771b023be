"""The authors' published MNLI adapter in a RoBERTa-base of true size."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

import loratool as lt
from tests.builders import relative_paths
from tests.systems.deploying import output

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ALPHA = 16.0  # by their training script; the file does not say


@pytest.mark.slow
def test_the_authors_mnli_adapter(shared_data: Path, tmp_path: Path) -> None:
    """Their file becomes a PEFT adapter, which PEFT runs and loratool merges to the same."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3
    )
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    published = shared_data / "roberta_base_lora_mnli.bin"
    lt.convert(published, tmp_path / "peft", alpha=ALPHA)
    assert "adapter_model.safetensors" in relative_paths(tmp_path / "peft")
    lt.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    lt.merge(tmp_path / "base", published, tmp_path / "directly", alpha=ALPHA)
    kind = transformers.RobertaForSequenceClassification
    of_base, of_merged, of_directly = (
        output(kind.from_pretrained(tmp_path / name).eval())
        for name in ("base", "merged", "directly")
    )
    base = kind.from_pretrained(tmp_path / "base")
    of_adapter = output(peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval())
    assert float((of_adapter - of_base).abs().max()) > 0.01
    torch.testing.assert_close(of_merged, of_adapter, rtol=1e-5, atol=1e-5)
    assert torch.equal(of_merged, of_directly)
    shutil.rmtree(tmp_path)  # 2 GB
