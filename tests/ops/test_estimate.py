"""The LoRA paper's own counts, and estimates from headers against what PEFT makes."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from loratool.algebra.cost import lora_parameters, svd_flops, training_memory
from loratool.errors import InputMissing, MalformedFile, NothingMatches, UsageError
from loratool.ops.estimate import estimate, known_models
from tests.builders import llama_weights, write_checkpoint
from tests.cli.invoke import invoke

PAPER = [
    ("roberta-base", 8, 294_912),
    ("roberta-large", 8, 786_432),
    ("deberta-xxl", 16, 4_718_592),
    ("gpt2-medium", 4, 393_216),
    ("gpt2-large", 4, 737_280),
    ("gpt3-175b", 1, 4_718_592),
    ("gpt3-175b", 4, 18_874_368),
    ("gpt3-175b", 8, 37_748_736),
]
SIZES = {  # published parameter counts, in millions
    "roberta-base": 125,
    "roberta-large": 355,
    "deberta-xxl": 1_560,
    "gpt2-medium": 355,
    "gpt2-large": 774,
    "gpt3-175b": 175_000,
}


@pytest.mark.parametrize(("model", "rank", "parameters"), PAPER)
def test_paper_trained_parameters(model: str, rank: int, parameters: int) -> None:
    assert estimate(model, rank=rank, targets="query,value").trained == parameters


@pytest.mark.parametrize("model", SIZES)
def test_paper_model_sizes(model: str) -> None:
    assert estimate(model).parameters == pytest.approx(SIZES[model] * 1e6, rel=0.01)


def test_every_named_model_is_counted() -> None:
    assert set(known_models()) == set(SIZES)


def test_gpt3_stands_beside_the_paper() -> None:
    report = estimate("gpt3-175b", rank=4, targets="query,value")
    assert report.adapter_bytes["float16"] == 36 * 2**20
    assert any("1.2 TB" in note for note in report.notes)
    assert report.full_training.total == 16 * report.parameters
    assert report.lora_training.total == 2 * report.parameters + 16 * report.trained


@pytest.mark.parametrize(
    ("model", "rank", "said"),
    [
        ("roberta-base", 8, "prints 0.3 M trained parameters for this"),
        ("deberta-xxl", 16, "prints 4.7 M trained parameters for this"),
        ("gpt2-medium", 4, "0.35 M trained parameters for this; 393,216 is the count"),
        ("gpt2-large", 4, "0.77 M trained parameters for this; 737,280 is the count"),
        ("gpt3-175b", 8, "prints 37.7 M trained parameters for this"),
    ],
)
def test_the_papers_figure_is_said(model: str, rank: int, said: str) -> None:
    notes = estimate(model, rank=rank, targets="query,value").notes
    assert any(note.endswith((said, f"{said}, which is not that")) for note in notes), notes
    for other in (
        estimate(model, rank=rank + 1, targets="q,v"),
        estimate(model, rank=rank, targets="attention"),
    ):
        assert not any("prints" in note for note in other.notes)


def test_memory_formula() -> None:
    memory = training_memory(100, 10)
    assert (memory.weights, memory.gradients, memory.optimizer) == (200, 20, 120)
    assert memory.total == 340


def test_parameters_of_a_rank_above_a_side() -> None:
    assert lora_parameters([(4, 10), (30, 20)], 8) == 4 * 14 + 8 * 50


def test_svd_flops_do_not_depend_on_orientation() -> None:
    assert svd_flops([(3, 7)]) == svd_flops([(7, 3)]) == 6 * 7 * 9 + 20 * 27


@pytest.fixture(scope="module")
def small_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=61,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for an old name
def test_a_checkpoint_counts_what_peft_trains(small_gpt2: Path) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(small_gpt2)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    trained, total = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    report = estimate(str(small_gpt2), rank=4, targets="c_attn,c_fc")
    assert (report.trained, report.parameters + report.trained) == (trained, total)
    assert report.model_bytes == 4 * report.parameters


def test_a_config_says_the_same_as_the_checkpoint(small_gpt2: Path, tmp_path: Path) -> None:
    alone = tmp_path / "config.json"
    alone.write_text((small_gpt2 / "config.json").read_text())
    of_file, of_folder = estimate(str(alone), rank=4), estimate(str(tmp_path), rank=4)
    of_weights = estimate(str(small_gpt2), rank=4)
    assert of_file.rows == of_folder.rows == of_weights.rows
    assert of_file.parameters == of_weights.parameters


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parts_of_a_fused_matrix(small_gpt2: Path) -> None:
    report = estimate(str(small_gpt2), rank=4, targets="q,v")
    assert report.trained == 2 * 2 * 4 * (32 + 32)
    assert any("one matrix" in note for note in report.notes)
    model = transformers.GPT2LMHeadModel.from_pretrained(small_gpt2)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    trained, _ = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    assert any(f"attn.c_attn, {trained:,} parameters" in note for note in report.notes)
    with_mlp = estimate(str(small_gpt2), rank=4, targets="q,v,c_fc")
    assert with_mlp.trained == report.trained + 2 * 4 * (32 + 128)


def test_cross_attention_has_no_query_in_its_fused_matrix(tmp_path: Path) -> None:
    """Its c_attn is k and v, of a width that three may divide."""
    config = transformers.GPT2Config(
        n_embd=36, n_layer=1, n_head=2, vocab_size=61, n_positions=16, bos_token_id=0,
        eos_token_id=0, add_cross_attention=True,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    assert estimate(str(tmp_path / "base"), rank=4, targets="q,v").trained == 2 * 4 * (36 + 36)
    words = ("init", tmp_path / "base", "-o", tmp_path / "start", "--targets", "q,v")
    done = invoke(*words, "--rank", "4", "--format", "loralib", "--json")
    assert json.loads(done.out)["totals"] == {"modules": 1, "parameters": 2 * 4 * (36 + 36)}


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_a_rank_that_makes_no_sense(rank: int, small_gpt2: Path) -> None:
    with pytest.raises(UsageError, match="rank"):
        estimate(str(small_gpt2), rank=rank, targets="c_attn")


def test_targets_that_match_nothing_show_near_misses(small_gpt2: Path) -> None:
    with pytest.raises(NothingMatches) as error:
        estimate(str(small_gpt2), targets="c_atn")
    assert "c_attn" in " ".join(error.value.details)


def test_an_unknown_type_is_counted_by_its_shapes(tmp_path: Path) -> None:
    """Where the config is not understood the headers are enough."""
    base = write_checkpoint(tmp_path / "base", llama_weights(), {"model_type": "bear"})
    expected = 2 * (8 + 8) + 2 * (8 + 4)
    assert estimate(str(base), rank=2, targets="q,v").trained == expected
    done = invoke("estimate", base, "--rank", "2", "--targets", "q,v")
    assert (done.code, f"trained: {expected} parameters" in done.out) == (0, True)
    out = ("-o", tmp_path / "start", "--rank", "2", "--targets", "q,v", "--json")
    started = invoke("init", base, *out)
    assert json.loads(started.out)["totals"]["parameters"] == expected


def test_near_misses_are_shown(small_gpt2: Path, tmp_path: Path) -> None:
    for words in (
        ("estimate", small_gpt2, "--targets", "c_atn"),
        ("init", small_gpt2, "-o", tmp_path / "start", "--targets", "c_atn"),
    ):
        done = invoke(*words)
        assert done.code == 4
        assert "closest: c_attn" in done.err


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputMissing) as error:
        estimate("gpt5")
    assert "roberta-base" in (error.value.hint or "")


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MalformedFile):
        estimate(str(tmp_path))


def test_command_line() -> None:
    done = invoke("estimate", "gpt3-175b", "--rank", "4", "--targets", "query,value", "--json")
    body = json.loads(done.out)
    assert body["schema"] == "loratool/estimate/1"
    assert body["trained_parameters"] == 18_874_368
    shown = invoke("estimate", "roberta-base", "--targets", "query,value")
    assert "294,912" in shown.out
    assert "assumed: Adam" in shown.err
