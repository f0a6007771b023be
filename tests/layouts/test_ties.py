"""Which names stand for one parameter, by architecture, and what that does to both directions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.adapter import Adapter, ModuleKind, Replacement, Update
from loratool.errors import DisagreementError
from loratool.layouts.config import ModelConfig
from loratool.layouts.kinds import classify
from loratool.layouts.pairs import align
from loratool.layouts.placing import place
from loratool.layouts.ties import find_ties
from loratool.ops.sources import open_model
from loratool.storage.dtypes import BY_NAME
from loratool.storage.tensors import MemoryTensor, TensorInfo
from tests.builders import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    gpt2_weights,
    llama_weights,
    random_tensor,
    write_checkpoint,
)

NONE = ModelConfig({})
LLAMA = ModelConfig(LLAMA_CONFIG)
TIED_LLAMA = ModelConfig(LLAMA_CONFIG | {"tie_word_embeddings": True})
TABLE = (20, 6)


def config(architecture: str, model_type: str = "", **values: Any) -> ModelConfig:
    return ModelConfig({"architectures": [architecture], "model_type": model_type} | values)


def ties(names: Mapping[str, Any], config: ModelConfig) -> list[tuple[tuple[str, ...], set[str]]]:
    shapes = {name: tuple(getattr(shape, "shape", shape)) for name, shape in names.items()}
    return [
        (tie.names, set(tie.stored)) for tie in find_ties(shapes, classify(shapes, config), config)
    ]


def test_decoders() -> None:
    llama = llama_weights()
    headless = {name: value for name, value in llama.items() if name != "lm_head.weight"}
    pair = ("model.embed_tokens.weight", "lm_head.weight")
    gpt2 = ("transformer.wte.weight", "lm_head.weight")
    assert ties(gpt2_weights(), ModelConfig(GPT2_CONFIG)) == [(gpt2, {gpt2[0]})]
    assert ties(llama, LLAMA) == []
    assert ties(headless, LLAMA) == []
    assert ties(llama, TIED_LLAMA) == [(pair, set(pair))]
    assert ties(headless, TIED_LLAMA) == [(pair, {pair[0]})]
    assert ties(llama, NONE) == []
    assert ties(headless, NONE) == []
    bare = ModelConfig(GPT2_CONFIG | {"architectures": ["GPT2Model"]})
    assert ties(gpt2_weights(), bare) == []
    assert ties(gpt2_weights() | {"other.wte.weight": (16, 8)}, ModelConfig(GPT2_CONFIG)) == []


BERT = {
    "bert.embeddings.word_embeddings.weight": TABLE,
    "cls.predictions.transform.dense.weight": (6, 6),
    "cls.predictions.bias": (20,),
}
ROBERTA = {
    "roberta.embeddings.word_embeddings.weight": TABLE,
    "lm_head.dense.weight": (6, 6),
    "lm_head.bias": (20,),
}


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForPreTraining", "Odd"])
def test_bert(architecture: str) -> None:
    weight = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    bias = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    assert ties(BERT, config(architecture)) == [(weight, {weight[0]}), (bias, {bias[0]})]
    stored = BERT | {weight[1]: TABLE, bias[1]: (20,)}
    assert ties(stored, config(architecture)) == [(weight, set(weight)), (bias, set(bias))]
    assert ties(stored, config(architecture, tie_word_embeddings=False)) == []


def test_roberta() -> None:
    weight = ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight")
    bias = ("lm_head.bias", "lm_head.decoder.bias")
    assert ties(ROBERTA, config("RobertaForMaskedLM")) == [
        (weight, {weight[0]}),
        (bias, {bias[0]}),
    ]


def test_a_classifier_has_no_tie() -> None:
    names = {"bert.embeddings.word_embeddings.weight": TABLE, "classifier.weight": (3, 6)}
    assert ties(names, config("BertForSequenceClassification")) == []


def test_whisper_and_a_head_of_its_own_bias() -> None:
    names = {"model.decoder.embed_tokens.weight": TABLE, "model.encoder.conv1.weight": (6, 8, 3)}
    pair = ("model.decoder.embed_tokens.weight", "proj_out.weight")
    assert ties(names, config("WhisperForConditionalGeneration")) == [(pair, {pair[0]})]
    phi = {"model.embed_tokens.weight": TABLE, "lm_head.weight": TABLE, "lm_head.bias": (20,)}
    assert ties(phi, config("PhiForCausalLM", tie_word_embeddings=False)) == []


@pytest.mark.parametrize("stem", ["", "model."])
def test_shared_tables(stem: str) -> None:
    names = {
        f"{stem}shared.weight": TABLE,
        f"{stem}encoder.layer.weight": (6, 6),
        f"{stem}decoder.layer.weight": (6, 6),
    }
    full = (
        f"{stem}shared.weight",
        f"{stem}encoder.embed_tokens.weight",
        f"{stem}decoder.embed_tokens.weight",
        "lm_head.weight",
    )
    t5 = config("T5ForConditionalGeneration", "t5")
    assert ties(names, t5) == [(full, {full[0]})]
    assert ties(names | dict.fromkeys(full, TABLE), t5) == [(full, set(full))]
    # T5 1.1: a head of its own, and still one table for both sides
    own_head = config("T5ForConditionalGeneration", "t5", tie_word_embeddings=False)
    assert ties(names | {"lm_head.weight": TABLE}, own_head) == [(full[:3], {full[0]})]
    encoder = {n: s for n, s in names.items() if ".decoder" not in f".{n}"}
    assert ties(encoder, config("T5EncoderModel", "t5")) == [(full[:2], {full[0]})]


# Merging onto ties ------------------------------------------------------------------------------


def infos(shapes: Mapping[str, Any]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, BY_NAME["F32"], tuple(shape), Path(), 0, 0)
        for name, shape in shapes.items()
    }


def replacement(*shape: int, seed: int = 0) -> Replacement:
    return Replacement(MemoryTensor(random_tensor(*shape, seed=seed)))


def test_every_name_must_change_alike_and_changes_once() -> None:
    names = {
        "shared.weight": TABLE,
        "encoder.layer.weight": (6, 6),
        "decoder.layer.weight": (6, 6),
    }
    t5 = config("T5ForConditionalGeneration", "t5")
    updates: dict[str, Update] = {
        name: replacement(*TABLE)
        for name in (
            "shared.weight",
            "encoder.embed_tokens.weight",
            "decoder.embed_tokens.weight",
            "lm_head.weight",
        )
    }
    placed = place([(Adapter(updates, "PEFT"), 1.0)], infos(names), t5)
    assert set(placed.updates) == {"shared.weight"}
    for name in updates:
        rest = {other: update for other, update in updates.items() if other != name}
        with pytest.raises(DisagreementError, match=f"ties it to {name}"):
            place([(Adapter(rest, "PEFT"), 1.0)], infos(names), t5)
        odd = updates | {name: replacement(*TABLE, seed=5)}
        with pytest.raises(DisagreementError, match="differently"):
            place([(Adapter(odd, "PEFT"), 1.0)], infos(names), t5)


def test_tied_biases() -> None:
    updates: dict[str, Update] = {
        name: replacement(20) for name in ("cls.predictions.bias", "cls.predictions.decoder.bias")
    }
    placed = place([(Adapter(updates, "PEFT"), 1.0)], infos(BERT), config("BertForMaskedLM"))
    assert set(placed.updates) == {"cls.predictions.bias"}


@pytest.mark.parametrize("equal", [True, False])
def test_names_stored_with_other_values_are_not_tied(equal: bool, tmp_path: Path) -> None:
    weights = llama_weights()
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table.clone() if equal else torch.flip(table, (0,))
    base = open_model(write_checkpoint(tmp_path / "base", weights, TIED_LLAMA.values))
    adapter = Adapter({"lm_head.weight": replacement(*table.shape)}, "PEFT")
    if equal:
        with pytest.raises(DisagreementError, match=r"changes lm_head.weight alone"):
            place([(adapter, 1.0)], base.checkpoint.tensors, base.config)
    else:
        placed = place([(adapter, 1.0)], base.checkpoint.tensors, base.config)
        assert list(placed.updates) == ["lm_head.weight"]


# Pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_stored_on_one_side_is_tied_only_if_its_values_say_so(
    side: str, equal: bool, tmp_path: Path
) -> None:
    """As transformers decides: an old checkpoint stores both names of one matrix."""
    settings = LLAMA_CONFIG | {"tie_word_embeddings": True}
    both = llama_weights()
    table = both["model.embed_tokens.weight"]
    both["lm_head.weight"] = table.clone() if equal else torch.flip(table, (0,))
    one = {name: value for name, value in both.items() if name != "lm_head.weight"}
    folders = {
        name: write_checkpoint(tmp_path / name, both if name == side else one, settings)
        for name in ("base", "tuned")
    }
    base, tuned = open_model(folders["base"]), open_model(folders["tuned"])
    aligned = align(base.checkpoint.tensors, tuned.checkpoint.tensors, base.config, tuned.config)
    names = [pair.name for pair in aligned.pairs]
    assert ("lm_head.weight" in names) is not equal
    assert [tie.names for tie in aligned.ties] == (
        [("model.embed_tokens.weight", "lm_head.weight")] if equal else []
    )
    assert any("lm_head.weight is stored on one side only" in note for note in aligned.notes)


# Kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deberta.encoder.rel_embeddings.weight", ModuleKind.POSITION),
        ("model.embed_something.weight", ModuleKind.POSITION),
        ("x.speaker_embedding.weight", ModuleKind.POSITION),
        ("x.item_emb.weight", ModuleKind.POSITION),
        ("rwkv.emb.weight", ModuleKind.POSITION),
        ("x.member.weight", ModuleKind.LINEAR),
        ("transformer.word_embedding.weight", ModuleKind.EMBEDDING),
        ("backbone.embeddings.weight", ModuleKind.EMBEDDING),
        ("embed_out.weight", ModuleKind.LINEAR),
        ("x.time_embedder.weight", ModuleKind.LINEAR),  # a bias beside it: no table
    ],
)
def test_tables_by_name(name: str, kind: ModuleKind) -> None:
    shapes = {name: (20, 6), "x.time_embedder.bias": (20,)}
    assert classify(shapes, NONE)[name] is kind


@pytest.mark.parametrize(
    ("architecture", "model_type", "task"),
    [
        ("T5ForConditionalGeneration", "t5", "SEQ_2_SEQ_LM"),
        ("WhisperForConditionalGeneration", "whisper", None),
        ("LlavaForConditionalGeneration", "llava", None),
        ("LlamaForCausalLM", "llama", "CAUSAL_LM"),
        ("CLIPModel", "clip", None),
    ],
)
def test_tasks(architecture: str, model_type: str, task: str | None) -> None:
    assert config(architecture, model_type).task_type == task
