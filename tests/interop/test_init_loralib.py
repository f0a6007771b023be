"""An adapter on query and value of GPT-2's fused matrix, by the LoRA authors' own library."""

from __future__ import annotations

import json
from pathlib import Path

import loralib
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import loratool as lt
from loratool.errors import NothingMatches, UnsupportedInput, UsageError
from tests.cli.invoke import invoke

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RANK, ALPHA, WIDTH, LAYERS = 4, 8, 32, 2
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def with_merged_linear(base: Path, parts: list[bool]) -> torch.nn.Module:
    """The model as the authors' examples change it: c_attn is a MergedLinear."""
    model = transformers.GPT2LMHeadModel.from_pretrained(base)
    for block in model.transformer.h:
        stored = block.attn.c_attn
        layer = loralib.MergedLinear(
            stored.nx, stored.nf, r=RANK, lora_alpha=ALPHA, enable_lora=parts, fan_in_fan_out=True
        )
        layer.weight.data, layer.bias.data = stored.weight.data, stored.bias.data
        block.attn.c_attn = layer
    loralib.mark_only_lora_as_trainable(model)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("targets", ["query,value", "k,v", "q,k,v"])
def test_trained_by_loralib_and_merged_here(targets: str, base: Path, tmp_path: Path) -> None:
    """ΔW = 0 at first; after training PEFT and the merged model say what loralib's model says,
    and the part that was not asked for has not moved."""
    start = tmp_path / "start"
    words = [word[0] for word in targets.split(",")]
    parts = [part in words for part in "qkv"]
    report = lt.init(base, start, rank=RANK, alpha=ALPHA, targets=targets, format="loralib", seed=3)
    assert report.parameters == LAYERS * len(words) * RANK * (WIDTH + WIDTH)
    factors = load_file(start / "lora.safetensors")
    model = with_merged_linear(base, parts)
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {name: value.shape for name, value in trainable.items()} == {
        name: value.shape for name, value in factors.items()
    }
    loaded = model.load_state_dict(factors, strict=False)
    assert not loaded.unexpected_keys
    assert torch.equal(logits(model), logits(transformers.GPT2LMHeadModel.from_pretrained(base)))
    model.train()
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    torch.save(loralib.lora_state_dict(model), tmp_path / "trained.pt")
    lt.convert(tmp_path / "trained.pt", tmp_path / "peft", alpha=ALPHA, fused_parts=",".join(words))
    expected = logits(model)
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)
    assert float((expected - logits(plain)).abs().max()) > 0.01
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    lt.merge(base, tmp_path / "peft", tmp_path / "merged")
    merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    before, after = (
        transformers.GPT2LMHeadModel.from_pretrained(path).transformer.h[1].attn.c_attn.weight
        for path in (base, tmp_path / "merged")
    )
    for part, adapted_part in enumerate(parts):
        columns = slice(part * WIDTH, (part + 1) * WIDTH)
        assert torch.equal(before[:, columns], after[:, columns]) is not adapted_part


def test_each_part_has_random_factors_of_its_own(base: Path, tmp_path: Path) -> None:
    """Of the spread that loralib's own initialisation has: uniform within ±1/√in."""
    lt.init(base, tmp_path / "start", rank=RANK, targets="q,v", format="loralib")
    factors = load_file(tmp_path / "start/lora.safetensors")
    values = {name: value for name, value in factors.items() if name.endswith("lora_A")}
    halves = [half for value in values.values() for half in value.split(RANK)]
    assert len({half.numpy().tobytes() for half in halves}) == 2 * LAYERS
    together = torch.cat(halves)
    assert float(together.abs().max()) <= WIDTH**-0.5
    assert float(together.std()) == pytest.approx((3 * WIDTH) ** -0.5, rel=0.1)


def test_layers_that_are_not_fused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    lt.init(tmp_path / "base", tmp_path / "start", rank=4, targets="q,v", format="loralib")
    layer = loralib.Linear(32, 16, r=4)
    key = "model.layers.0.self_attn.v_proj.lora_{}"
    factors = load_file(tmp_path / "start/lora.safetensors")
    assert len(factors) == 4
    for side in "AB":
        assert factors[key.format(side)].shape == getattr(layer, f"lora_{side}").shape


def test_peft_says_what_it_cannot_do(base: Path, tmp_path: Path) -> None:
    done = invoke("init", base, "-o", tmp_path / "start", "--targets", "query,value")
    assert done.code == 2
    assert "h.0.attn.c_attn (and 1 like it) holds q, k and v in one matrix" in done.err
    assert "--targets c_attn" in done.err
    assert "--format loralib" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", ["peft", "loralib"])
def test_a_whole_holds_its_parts(format_name: str, base: Path, tmp_path: Path) -> None:
    report = lt.init(base, tmp_path / "start", rank=4, targets="q,c_attn", format=format_name)
    assert report.parameters == LAYERS * 4 * (WIDTH + 3 * WIDTH)
    assert not any(row.parts for row in report.rows)


def test_the_command_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    where = ("init", base, "-o", tmp_path / "start", "--targets", "q,v", "--format", "loralib")
    planned = json.loads(invoke(*where, "--dry-run", "--json").out)
    assert planned["fused_parts"] == ["q", "v"]
    assert planned["parameters"] == LAYERS * 2 * 8 * (WIDTH + WIDTH)
    assert not list(tmp_path.iterdir())
    done = invoke(*where, "--alpha", "16")
    assert done.code == 0, done.err
    assert "enable_lora=[True, False, True]" in done.out
    assert "--alpha 16 --fused-parts q,v" in done.out
    report = json.loads((tmp_path / "start/loratool_report.json").read_text())
    assert [row["parts"] for row in report["modules"]] == [["q", "v"]] * LAYERS


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"targets": "q"}, UsageError, "one part of transformer.h.0.attn.c_attn"),
        ({"targets": "q,nose"}, NothingMatches, "nose"),
        (
            {"targets": r".*h\.0\.attn\.[qv]_proj|.*h\.1\.attn\.[kv]_proj"},
            UsageError,
            "different parts",
        ),
        ({"targets": "q,v", "method": "pissa", "residual": Path("r")}, UsageError, "B = 0"),
        ({"targets": "wpe"}, UnsupportedInput, "embedding"),
        ({"targets": "q,v", "format": "pdf"}, UsageError, "pdf"),
    ],
)
def test_what_has_no_place_in_the_format(
    arguments: dict[str, object], error: type[Exception], text: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        lt.init(base, tmp_path / "start", **{"format": "loralib", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", ["peft", "loralib"])
def test_heads_one_after_the_other_are_no_thirds(format_name: str, tmp_path: Path) -> None:
    """GPT-NeoX has q, k and v of each head side by side: not a MergedLinear's parts."""
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=61,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=r"query_key_value .*q, k and") as caught:
        lt.init(tmp_path / "base", tmp_path / "start", targets="q,v", format=format_name)
    assert "--targets query_key_value" in (caught.value.hint or "")
    assert "--format loralib" not in (caught.value.hint or "")
