"""Adapters of the paper's systems through transformers and PEFT: what is deployed is what trained.

The adapter on its base and the merged model say the same, the merged model has the base's modules
and parameters, and an adapter that starts training changes nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

import loratool as lt
from tests.builders import relative_paths
from tests.systems.conftest import Rows
from tests.systems.rows import SYSTEMS, Row

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
ALPHA = 16.0  # of the authors' MNLI adapter, by their training script
CLASSES = {
    "roberta": transformers.RobertaModel,
    "deberta-v2": transformers.DebertaV2Model,
    "gpt2": transformers.GPT2LMHeadModel,
}


def opened(path: Path, config: dict[str, object]) -> torch.nn.Module:
    """In float32; every parameter of the model must be in the checkpoint."""
    kind = CLASSES[str(config["model_type"])]
    bare = {"add_pooling_layer": False} if kind is transformers.RobertaModel else {}
    model, loading = kind.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **bare
    )
    assert not loading["missing_keys"], loading
    assert not loading["mismatched_keys"], loading
    return model.eval()


def output(model: torch.nn.Module) -> Tensor:
    """Logits, or the last hidden state where the base has no head."""
    tokens = torch.arange(3, 27)[None]
    with torch.no_grad():
        return model(tokens)[0]


class Headed(torch.nn.Module):
    """A bare model under the name that it has inside a task's model, where its adapter knows it."""

    def __init__(self, model: torch.nn.Module, prefix: str):
        super().__init__()
        self.config = model.config
        self.inside = prefix
        setattr(self, prefix, model)

    def forward(self, *arguments: object, **named: object) -> object:
        return getattr(self, self.inside)(*arguments, **named)


def adapted(row: Row, adapter: Path) -> torch.nn.Module:
    """PEFT's model of base and adapter; a bare base's modules lack the task's prefix."""
    model = opened(row.base, row.config)
    prefix = {"roberta": "roberta", "deberta-v2": "deberta"}.get(str(row.config["model_type"]))
    return peft.PeftModel.from_pretrained(
        Headed(model, prefix) if prefix else model, adapter
    ).eval()


def check_deployed(row: Row) -> None:
    out = row.folder / "deployed"
    lt.merge(row.base, row.adapter, out, dtype="float32")
    of_base, base_graph = output_and_graph(opened(row.base, row.config))
    of_merged, merged_graph = output_and_graph(opened(out, row.config))
    assert merged_graph == base_graph
    of_adapter = output(adapted(row, row.adapter))
    moved = float((of_adapter - of_base).abs().max())
    assert moved > 0.01, "the adapter does something"
    assert float((of_merged - of_adapter).abs().max()) < 1e-3 * moved


def output_and_graph(model: torch.nn.Module) -> tuple[Tensor, list[object]]:
    """What the model says, and every module's and parameter's name and kind or shape."""
    graph: list[object] = [(name, type(module)) for name, module in model.named_modules()]
    graph += [(name, tuple(value.shape)) for name, value in model.named_parameters()]
    return output(model), graph


def check_start(row: Row) -> None:
    out = row.folder / "untrained"
    lt.init(row.base, out, rank=row.system.rank, targets=",".join(row.system.modules))
    started = adapted(row, out)
    layers = [module for module in started.modules() if hasattr(module, "lora_A")]
    assert len(layers) == row.matrices
    assert not any(bool(layer.get_delta_weight("default").any()) for layer in layers)
    of_start = output(started)
    del started, layers
    assert torch.equal(of_start, output(opened(row.base, row.config)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_merged_is_adapter(name: str, thin: Rows) -> None:
    check_deployed(thin(name))


@pytest.mark.parametrize("name", SYSTEMS)
def test_start_changes_nothing(name: str, thin: Rows) -> None:
    check_start(thin(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta-base", "roberta-large", "gpt2-medium", "gpt2-large"])
def test_merged_is_adapter_in_true_size(name: str, full_size: Rows) -> None:
    check_deployed(full_size(name))
    check_start(full_size(name))


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
