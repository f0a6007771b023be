"""Adapters in another form: loralib's files against loralib, starts that were not zero."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import loralib
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loratool.errors import DisagreementError, MalformedFile, UsageError
from loratool.ops.convert import plan_convert, run_convert
from loratool.ops.init import plan_init, run_init
from loratool.ops.sources import open_adapter
from tests.builders import lora_factors, write_peft
from tests.cli.invoke import invoke

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WIDTH, RANK, ALPHA = 8, 2, 6
C_ATTN = "transformer.h.0.attn.c_attn"


def merged_linear(enabled: list[bool]) -> loralib.MergedLinear:
    torch.manual_seed(0)
    module = loralib.MergedLinear(
        WIDTH, 3 * WIDTH, r=RANK, lora_alpha=ALPHA, enable_lora=enabled, fan_in_fan_out=True
    )
    torch.nn.init.normal_(module.lora_B)
    return module


def loralib_file(path: Path, module: loralib.MergedLinear) -> Path:
    factors = loralib.lora_state_dict(module)
    save_file({f"{C_ATTN}.{key}": value.contiguous() for key, value in factors.items()}, path)
    return path


@pytest.mark.parametrize("parts", ["q,v", "q,k", "k,v", "q,k,v"])
def test_fused_parts_mean_what_loralib_does(parts: str, tmp_path: Path) -> None:
    module = merged_linear([part in parts for part in "qkv"])
    file = loralib_file(tmp_path / "lora.safetensors", module)
    run_convert(plan_convert(file, tmp_path / "out", alpha=ALPHA, fused_parts=parts))
    update = open_adapter(tmp_path / "out").low_rank[f"{C_ATTN}.weight"]
    expected = module.merge_AB().T.double() * module.scaling  # loralib's is stored (in, out)
    torch.testing.assert_close(update.load().dense(), expected, rtol=1e-6, atol=1e-7)
    assert update.scale == ALPHA / RANK


def test_the_converted_file_merges_and_loads_in_peft(tmp_path: Path) -> None:
    module = merged_linear([True, False, True])
    file = loralib_file(tmp_path / "lora.safetensors", module)
    run_convert(plan_convert(file, tmp_path / "out", alpha=ALPHA, fused_parts="q,v"))
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=16, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    before = base.transformer.h[0].attn.c_attn.weight.detach().clone()
    done = invoke("merge", tmp_path / "base", tmp_path / "out", "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "merged/model.safetensors")[f"{C_ATTN}.weight"]
    torch.testing.assert_close(merged, before + module.merge_AB() * module.scaling)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    alone = adapted.merge_and_unload().transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(alone, merged)


@pytest.mark.parametrize("parts", [None, "q", "q,k,v"])
def test_parts_that_do_not_fit_are_asked_for(parts: str | None, tmp_path: Path) -> None:
    file = loralib_file(tmp_path / "lora.safetensors", merged_linear([True, False, True]))
    with pytest.raises(UsageError, match="2 parts"):
        plan_convert(file, tmp_path / "out", alpha=ALPHA, fused_parts=parts)


@pytest.mark.parametrize("parts", ["", "q,x", "q,q"])
def test_parts_that_are_none(parts: str, tmp_path: Path) -> None:
    file = loralib_file(tmp_path / "lora.safetensors", merged_linear([True, False, True]))
    with pytest.raises(UsageError, match="fused-parts"):
        plan_convert(file, tmp_path / "out", alpha=ALPHA, fused_parts=parts)


def test_parts_of_what_is_not_fused(tmp_path: Path) -> None:
    factors = {f"{C_ATTN}.lora_A": torch.ones(2, 8), f"{C_ATTN}.lora_B": torch.ones(24, 2)}
    save_file(factors, tmp_path / "plain.safetensors")
    write_peft(tmp_path / "peft", lora_factors(C_ATTN, 24, 8, 2))
    for path, alpha in (("plain.safetensors", 4.0), ("peft", None)):
        with pytest.raises(UsageError, match="fused"):
            plan_convert(tmp_path / path, tmp_path / "out", alpha=alpha, fused_parts="q,v")


def test_factors_that_fit_no_parts(tmp_path: Path) -> None:
    factors = {f"{C_ATTN}.lora_A": torch.ones(3, 8), f"{C_ATTN}.lora_B": torch.ones(24, 2)}
    save_file(factors, tmp_path / "odd.safetensors")
    with pytest.raises(MalformedFile, match="do not chain"):
        plan_convert(tmp_path / "odd.safetensors", tmp_path / "out", alpha=1.0, fused_parts="q,v")


def test_the_authors_adapter_keeps_every_update(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "roberta_base_lora_mnli.bin"
    done = invoke("convert", file, "-o", tmp_path / "mnli", "--alpha", "16")
    assert done.code == 0, done.err
    before, after = open_adapter(file, 16.0), open_adapter(tmp_path / "mnli")
    assert len(after.low_rank) == 24
    for name, update in before.low_rank.items():
        one, two = update.load(), after.low_rank[name].load()
        assert one.scale == two.scale
        assert torch.equal(one.b, two.b)
        assert torch.equal(one.a, two.a)
    assert set(before.replacements) == set(after.replacements)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, start and residual by PiSSA, and what three steps of training made of the start."""
    folder = tmp_path_factory.mktemp("pissa")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    run_init(
        plan_init(
            folder / "base",
            folder / "start",
            rank=3,
            alpha=6,
            method="pissa",
            residual=folder / "residual",
        )
    )
    residual = transformers.AutoModelForCausalLM.from_pretrained(folder / "residual")
    model = peft.PeftModel.from_pretrained(residual, folder / "start", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    tokens = torch.arange(12)[None]
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "trained")
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, folder / "logits.pt")
    return folder


def test_without_its_start_it_fits_the_original_base(trained: Path, tmp_path: Path) -> None:
    done = invoke(
        "convert", trained / "trained", "-o", tmp_path / "plain", "--start", trained / "start"
    )
    assert done.code == 0, done.err
    base = transformers.AutoModelForCausalLM.from_pretrained(trained / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "plain")
    with torch.no_grad():
        logits = model.eval()(torch.arange(12)[None]).logits
    torch.testing.assert_close(logits, torch.load(trained / "logits.pt"), rtol=1e-4, atol=1e-5)
    assert {update.rank for update in open_adapter(tmp_path / "plain").low_rank.values()} == {6}


@pytest.mark.parametrize("said", ["owner/base", None])
def test_the_residual_is_not_named_as_its_base(
    said: str | None, trained: Path, tmp_path: Path
) -> None:
    """Training records the residual base, the result is for the original one."""
    start = shutil.copytree(trained / "start", tmp_path / "start")
    assert (
        json.loads((start / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    )
    report = json.loads((start / "loratool_report.json").read_text())
    (start / "loratool_report.json").write_text(json.dumps({**report, "base_model": said}))
    recorded = json.loads((trained / "trained/adapter_config.json").read_text())
    assert "residual" in recorded["base_model_name_or_path"]
    for more, expected in ((), said), (("--base-model", "other/base"), "other/base"):
        where = ("-o", tmp_path / "plain", "--start", start, "--overwrite")
        done = invoke("convert", trained / "trained", *where, *more)
        config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == expected
        assert ("names no base" in done.out) is (expected is None)


def test_the_wrong_start_is_refused(trained: Path, tmp_path: Path) -> None:
    factors = lora_factors("model.layers.0.self_attn.q_proj", 32, 32, 3)
    write_peft(tmp_path / "other", factors)
    for start in (tmp_path / "other", trained / "trained"):
        with pytest.raises(DisagreementError):
            plan_convert(trained / "trained", tmp_path / "out", start=start)


def test_command_line(tmp_path: Path) -> None:
    file = loralib_file(tmp_path / "lora.safetensors", merged_linear([True, False, True]))
    where = ("convert", file, "-o", tmp_path / "out", "--alpha", "6", "--fused-parts", "q,v")
    planned = invoke(*where, "--dry-run")
    assert "would write 1 update from loralib as PEFT" in planned.out
    assert not (tmp_path / "out").exists()
    body = json.loads(invoke(*where, "--json").out)
    assert body["schema"] == "loratool/convert/1"
    assert body["totals"]["parameters"] == 3 * 8 * 4 + 4 * 8
    assert invoke(*where).code == 5
