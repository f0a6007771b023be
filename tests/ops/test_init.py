"""Adapters to train from: PEFT loads them, they start where their papers say, training goes on."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratool.errors import NothingMatches, OutputError, UnsupportedInput, UsageError
from loratool.inits.registry import INITS
from loratool.ops.init import plan_init, run_init
from tests.cli.invoke import invoke

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
FROM_WEIGHTS = [name for name, init in INITS.items() if init.changes_base]
FROM_SHAPES = [name for name, init in INITS.items() if not init.changes_base]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=32,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    folders = {}
    for name, model in (
        ("llama", transformers.LlamaForCausalLM(llama)),
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)),
    ):
        folders[name] = tmp_path_factory.mktemp(name) / "base"
        model.save_pretrained(folders[name])
    return folders


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def trained_on(base: Path, adapter: Path) -> peft.PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)


@pytest.mark.parametrize("method", FROM_SHAPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_papers_start_changes_nothing(
    name: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run_init(plan_init(bases[name], tmp_path / "start", rank=4, alpha=8, method=method))
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    model = trained_on(bases[name], tmp_path / "start")
    assert torch.equal(logits(model), logits(base))
    factors = load_file(tmp_path / "start/adapter_model.safetensors")
    assert all(not value.any() for key, value in factors.items() if "lora_B" in key)
    assert all(value.any() for key, value in factors.items() if "lora_A" in key)


def test_factors_have_the_spread_of_pefts(bases: dict[str, Path], tmp_path: Path) -> None:
    for method, flag in (("kaiming", True), ("gaussian", "gaussian")):
        out = tmp_path / method
        run_init(plan_init(bases["llama"], out, rank=16, method=method))
        ours = load_file(out / "adapter_model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
        config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=flag)
        theirs = dict(peft.get_peft_model(model, config).named_parameters())
        for key, value in ours.items():
            if "lora_A" not in key:
                continue
            other = theirs[key.replace(".weight", ".default.weight")]
            assert value.shape == other.shape
            assert float(value.std()) == pytest.approx(float(other.std()), rel=0.15)
            assert float(value.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.5)


@pytest.mark.parametrize("method", FROM_WEIGHTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_residual_and_start_make_the_base(
    name: str, method: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    start, residual = tmp_path / "start", tmp_path / "residual"
    plan = plan_init(bases[name], start, rank=4, alpha=8, method=method, residual=residual)
    run_init(plan)
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    assert not torch.equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(residual)), logits(base)
    )
    model = trained_on(residual, start)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "name"),
    [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")],  # PEFT's olora forgets Conv1D
)
def test_the_start_is_pefts(method: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    start, residual = tmp_path / "start", tmp_path / "residual"
    plan = plan_init(
        bases[name], start, rank=4, alpha=8, targets="attention", method=method, residual=residual
    )
    run_init(plan)
    model = transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=method,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if name == "llama"
        else ["attn.c_attn", "attn.c_proj"],
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config).state_dict()
    ours = load_file(start / "adapter_model.safetensors")
    without = load_file(residual / "model.safetensors")
    modules = {key.partition(".lora_")[0] for key in ours}
    for module in modules:
        product = ours[f"{module}.lora_B.weight"] @ ours[f"{module}.lora_A.weight"]
        expected = (
            theirs[f"{module}.lora_B.default.weight"] @ theirs[f"{module}.lora_A.default.weight"]
        )
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
        key = module.removeprefix("base_model.model.") + ".weight"
        mine = without.get(key, without.get(key.removeprefix("transformer.")))
        torch.testing.assert_close(
            mine, theirs[f"{module}.base_layer.weight"], rtol=1e-4, atol=1e-5
        )


def test_pissa_and_milora_take_the_two_ends_of_the_spectrum(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    kept = {}
    for method in ("pissa", "milora"):
        plan = plan_init(
            bases["llama"], tmp_path / method, rank=4, targets="q_proj", method=method,
            residual=tmp_path / f"{method}-residual",
        )  # fmt: skip
        kept[method] = {row.name: row.energy_kept for row in run_init(plan).rows}
    weights = load_file(bases["llama"] / "model.safetensors")
    for name in kept["pissa"]:
        energy = torch.linalg.svdvals(weights[name].double()).square()
        assert kept["pissa"][name] == pytest.approx(
            float(energy[:4].sum() / energy.sum()), rel=1e-5
        )
        assert kept["milora"][name] == pytest.approx(
            float(energy[-4:].sum() / energy.sum()), rel=1e-3, abs=1e-9
        )


def test_training_and_merging_go_on_from_it(bases: dict[str, Path], tmp_path: Path) -> None:
    run_init(plan_init(bases["llama"], tmp_path / "start", rank=4, targets="q,v"))
    model = trained_on(bases["llama"], tmp_path / "start")
    trainable = [value for value in model.parameters() if value.requires_grad]
    assert sum(value.numel() for value in trainable) == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    optimizer = torch.optim.SGD(trainable, lr=5.0)
    tokens = torch.arange(12)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    done = invoke("merge", bases["llama"], tmp_path / "trained", "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        logits(merged), logits(transformers.AutoModelForCausalLM.from_pretrained(bases["llama"]))
    )


def test_same_seed_same_bytes(bases: dict[str, Path], tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        run_init(plan_init(bases["llama"], tmp_path / str(number), seed=seed))
        files.append((tmp_path / f"{number}/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_embeddings_start_from_zero_as_in_peft(bases: dict[str, Path], tmp_path: Path) -> None:
    run_init(plan_init(bases["llama"], tmp_path / "start", rank=4, targets="embed_tokens"))
    factors = load_file(tmp_path / "start/adapter_model.safetensors")
    shapes = {key.rpartition("lora_")[2]: tuple(value.shape) for key, value in factors.items()}
    assert shapes == {"embedding_A": (4, 61), "embedding_B": (32, 4)}
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    assert torch.equal(logits(trained_on(bases["llama"], tmp_path / "start")), logits(base))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rank": 0}, UsageError, "rank 0"),
        ({"rank": 33}, UsageError, "above the smaller side"),
        ({"alpha": 0.0}, UsageError, "alpha"),
        ({"method": "pizza"}, UsageError, "pizza"),
        ({"method": "pissa"}, UsageError, "needs the base"),
        ({"targets": "q_prj"}, NothingMatches, "q_prj"),
        ({"dtype": "int8"}, UsageError, "int8"),
    ],
)
def test_what_makes_no_sense(
    arguments: dict[str, object],
    error: type[Exception],
    text: str,
    bases: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=text):
        plan_init(bases["llama"], tmp_path / "start", **arguments)
    assert not list(tmp_path.iterdir())


def test_residual_where_none_is_needed(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves the base"):
        plan_init(bases["llama"], tmp_path / "start", residual=tmp_path / "residual")


def test_the_base_is_never_the_output(bases: dict[str, Path], tmp_path: Path) -> None:
    for output, residual in ((bases["llama"], tmp_path / "r"), (tmp_path / "s", bases["llama"])):
        with pytest.raises(OutputError):
            plan_init(bases["llama"], output, method="pissa", residual=residual, overwrite=True)


def test_a_tied_table_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="tied"):
        plan_init(bases["gpt2"], tmp_path / "start", targets="wte")


def test_command_line(bases: dict[str, Path], tmp_path: Path) -> None:
    where = ("init", bases["llama"], "-o", tmp_path / "start", "--targets", "q,v")
    planned = invoke(*where, "--dry-run")
    assert planned.code == 0
    assert "would start 4 modules" in planned.out
    assert not (tmp_path / "start").exists()
    done = invoke(*where, "--json")
    body = json.loads(done.out)
    assert body["schema"] == "loratool/init/1"
    assert body["totals"]["parameters"] == 2 * (8 * (32 + 32) + 8 * (32 + 16))
    config = json.loads((tmp_path / "start/adapter_config.json").read_text())
    assert config["inference_mode"] is False
    again = invoke(*where)
    assert again.code == 5
    residual = ("--method", "pissa", "--residual", tmp_path / "residual", "--overwrite")
    shown = invoke(*where, *residual)
    assert "train on it" in shown.out
