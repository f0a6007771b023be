"""What the paper promises of deployment, by transformers and PEFT: W0 + s·B·A, nothing beside."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor

import loratool as lt
from tests.systems.rows import Row

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


def check_deploy(row: Row) -> None:
    """The start changes nothing; the merged model says what base and adapter together say, with
    no other module or parameter than the base."""
    of_base, base_graph = output_and_graph(opened(row.base, row.config))
    check_start(row, of_base)
    with row.output("deployed") as out:
        lt.merge(row.base, row.adapter, out, dtype="float32")
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


def check_start(row: Row, of_base: Tensor) -> None:
    """ΔW is exactly zero in every module, and so the output is the base's, bit for bit."""
    with row.output("untrained") as out:
        lt.init(row.base, out, rank=row.system.rank, targets=",".join(row.system.modules))
        started = adapted(row, out)
    layers = [module for module in started.modules() if hasattr(module, "lora_A")]
    assert len(layers) == row.matrices
    for layer in layers:
        assert bool(layer.lora_A["default"].weight.any())
        assert not bool(layer.lora_B["default"].weight.any())
    assert not bool(layers[0].get_delta_weight("default").any())
    assert torch.equal(output(started), of_base)
