"""Merging into tied embeddings and heads, and biases that the base has not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratool as lt
from loratool.errors import DisagreementError, UnsupportedInput, UsageError
from tests.algebra.reference import exact_merge, same_bits
from tests.cli.invoke import invoke
from tests.faults.killing import bytes_of
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, load_folder, save_folder
from tests.ops.builders import save_peft as save_linear
from tests.ops.test_merge import DOWN1, Q0, factors
from tests.ops.test_merge_strict import replacing

EMBED, HEAD = "model.embed_tokens", "lm_head"
TIED = LLAMA | {"tie_word_embeddings": True}


def tied_state() -> dict[str, Tensor]:
    state = llama_like(torch.bfloat16)
    del state["lm_head.weight"]
    return state


def save_sides(folder: Path, sides: dict[str, tuple[Tensor, ...]]) -> Path:
    """An adapter on the embedding, the head, or both; factors as those of the (50, 24) table."""
    tensors = {}
    for module, (a, b) in sides.items():
        if module == EMBED:
            tensors[f"base_model.model.{module}.lora_embedding_A"] = b.T.contiguous()
            tensors[f"base_model.model.{module}.lora_embedding_B"] = a.T.contiguous()
        else:
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_with(table: Tensor, pair: tuple[Tensor, ...]) -> Tensor:
    return exact_merge(table, [(pair[1], pair[0], 2.0)], table.dtype)


@pytest.mark.parametrize("side", [EMBED, HEAD])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_one_side_of_a_tie(tmp_path: Path, side: str, stored: str) -> None:
    """An error; with --tied both change; with --untie one does, and both are stored."""
    state = tied_state()
    table = state[f"{EMBED}.weight"]
    if stored == "twice":
        state["lm_head.weight"] = table.clone()
    base = save_folder(state, tmp_path / "base", TIED, shards=2)
    pair = factors(50, 24)
    adapter = save_sides(tmp_path / "adapter", {side: pair})
    with pytest.raises(DisagreementError, match=r"changes .* alone") as refused:
        lt.merge(base, adapter, tmp_path / "out")
    assert "--tied" in str(refused.value.hint)
    assert "--untie" in str(refused.value.hint)

    report = lt.merge(base, adapter, tmp_path / "both", ties="both")
    both = load_folder(tmp_path / "both")
    assert both.keys() == state.keys()
    expected = merged_with(table, pair)
    assert all(
        same_bits(both[f"{name}.weight"], expected)
        for name in (EMBED, HEAD)[: len(both)]
        if f"{name}.weight" in both
    )
    assert any("alone" in note for note in report.facts["notes"])
    assert json.loads((tmp_path / "both" / "config.json").read_text()) == TIED

    report = lt.merge(base, adapter, tmp_path / "apart", ties="apart")
    apart = load_folder(tmp_path / "apart")
    assert apart.keys() == state.keys() | {"lm_head.weight"}
    for name in (EMBED, HEAD):
        assert same_bits(apart[f"{name}.weight"], expected if name == side else table)
    config = json.loads((tmp_path / "apart" / "config.json").read_text())
    assert config == TIED | {"tie_word_embeddings": False}
    assert any("no longer tied" in note for note in report.facts["notes"])
    index = json.loads((tmp_path / "apart" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(apart)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in apart.values())


def test_different_updates_of_both_sides(tmp_path: Path) -> None:
    state = tied_state()
    base = save_folder(state, tmp_path / "base", TIED)
    sides = {EMBED: factors(50, 24), HEAD: factors(50, 24, seed=9)}
    adapter = save_sides(tmp_path / "adapter", sides)
    for choice in ("refuse", "both"):
        with pytest.raises(DisagreementError, match="differently"):
            lt.merge(base, adapter, tmp_path / "out", ties=choice)  # type: ignore[arg-type]
    lt.merge(base, adapter, tmp_path / "out", ties="apart", dtype="float32")
    merged = load_folder(tmp_path / "out")
    table = state[f"{EMBED}.weight"]
    for name, (a, b) in sides.items():
        expected = exact_merge(table, [(b, a, 2.0)], torch.float32)
        assert same_bits(merged[f"{name}.weight"], expected)


def test_nothing_to_untie(tmp_path: Path) -> None:
    adapter = save_linear(tmp_path / "adapter", {Q0: factors(24, 24)})
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    with pytest.raises(UsageError, match="ties no output head"):
        lt.merge(base, adapter, tmp_path / "out", ties="apart")
    bare = save_folder(gpt2_like(), tmp_path / "bare", GPT2)
    adapter = save_linear(tmp_path / "gpt2", {"h.0.mlp.c_fc": factors(64, 16)})
    with pytest.raises(UnsupportedInput, match="without the prefix"):
        lt.merge(bare, adapter, tmp_path / "out", ties="apart")
    assert not (tmp_path / "out").exists()


FILE = "model.safetensors"


def with_bias(folder: Path) -> tuple[Path, Tensor]:
    """An adapter of q_proj with lora_bias, and the bias it trained."""
    a, b = factors(24, 24)
    bias = torch.linspace(-1, 1, 24)
    folder.mkdir()
    name = f"base_model.model.{Q0}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.lora_B.bias": bias}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "lora_bias": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, bias


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_bias_that_the_base_has_not(tmp_path: Path, dtype: str | None) -> None:
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA, shards=2)
    adapter, bias = with_bias(tmp_path / "adapter")
    with pytest.raises(
        DisagreementError, match="for 1 module that has none in the base"
    ) as refused:
        lt.merge(base, adapter, tmp_path / "out")
    assert "--add-bias" in str(refused.value.hint)
    report = lt.merge(base, [(adapter, 0.5)], tmp_path / "out", add_bias=True, dtype=dtype)
    merged = load_folder(tmp_path / "out")
    assert merged.keys() == state.keys() | {f"{Q0}.bias"}
    expected = (2.0 * 0.5 * bias.double()).to(torch.float32 if dtype else torch.bfloat16)
    assert same_bits(merged[f"{Q0}.bias"], expected)
    assert any("1 bias is added" in note for note in report.facts["notes"])


def test_the_command_line(tmp_path: Path) -> None:
    base = save_folder(tied_state(), tmp_path / "base", TIED)
    adapter = save_sides(tmp_path / "adapter", {HEAD: factors(50, 24)})
    out = tmp_path / "out"
    refused = invoke("merge", base, adapter, "-o", out)
    assert refused.code == 4
    assert "--untie stores both apart" in refused.err
    ended = invoke("merge", base, adapter, "-o", out, "--untie")
    assert ended.code == 0
    assert "lm_head.weight is no longer tied to model.embed_tokens.weight" in ended.err
    clash = invoke("merge", base, adapter, "--in-place", "--untie")
    assert "--in-place does not go with --untie" in clash.err


def test_a_receipt_undoes_what_was_added(tmp_path: Path) -> None:
    """Untied, and with biases added, the base still comes back from the receipt to the last bit."""
    head = save_folder(tied_state(), tmp_path / "tied", TIED, shards=2)
    bias, _ = with_bias(tmp_path / "bias")
    adapter = save_sides(tmp_path / "adapter", {HEAD: factors(50, 24)})
    lt.merge(head, adapter, tmp_path / "m1", ties="apart", receipt=True)
    lt.merge(head, bias, tmp_path / "m2", add_bias=True, receipt=True)
    lt.merge(head, adapter, tmp_path / "m3", ties="both", receipt=True)
    for merged, used in (("m1", adapter), ("m2", bias), ("m3", adapter)):
        assert lt.verify(tmp_path / merged, head, used).is_equal
        assert lt.verify(tmp_path / merged, head, used, fast=True).is_equal
        lt.unmerge(tmp_path / merged, used, tmp_path / f"{merged}-base")
        assert bytes_of(tmp_path / f"{merged}-base") == bytes_of(head)


@pytest.mark.parametrize("fast", [False, True])
def test_verify_looks_at_what_was_added(tmp_path: Path, fast: bool) -> None:
    head = save_folder(tied_state(), tmp_path / "tied", TIED)
    bias, _ = with_bias(tmp_path / "bias")
    adapter = save_sides(tmp_path / "adapter", {HEAD: factors(50, 24)})
    lt.merge(head, adapter, tmp_path / "untied", ties="apart", receipt=True)
    lt.merge(head, bias, tmp_path / "biased", add_bias=True, receipt=True)
    for folder, used, name in (("untied", adapter, HEAD), ("biased", bias, Q0)):
        merged = tmp_path / folder
        name = f"{name}.bias" if folder == "biased" else f"{name}.weight"
        state = load_folder(merged)
        weights = {key: value for key, value in state.items() if key in load_file(merged / FILE)}
        weights[name].view(-1)[3] += 1
        save_file(weights, merged / FILE, {"format": "pt"})
        report = lt.verify(merged, head, used, fast=fast)
        assert report.differs
        assert [row.name for row in report.rows if row.status != "equal"] == [name]
        del weights[name]
        save_file(weights, merged / FILE, {"format": "pt"})
        report = lt.verify(merged, head, used, fast=fast)
        assert [row.name for row in report.rows if row.status == "missing"] == [name]


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_in_place_a_tie_is_kept_or_nothing_is_done(tmp_path: Path, stored: str) -> None:
    state = tied_state()
    if stored == "twice":
        state[f"{HEAD}.weight"] = state["model.embed_tokens.weight"].clone()
    base = save_folder(state, tmp_path / "tied", TIED)
    adapter = save_sides(tmp_path / "adapter", {HEAD: factors(50, 24)})
    before = bytes_of(base)
    with pytest.raises(DisagreementError, match="but the base ties it to"):
        lt.merge_in_place(base, adapter)
    bias, _ = with_bias(tmp_path / "bias")
    with pytest.raises(DisagreementError, match="for 1 module that has none in the base"):
        lt.merge_in_place(base, bias)
    for option in ("--untie", "--add-bias"):
        refused = invoke("merge", base, adapter, "--in-place", option)
        assert refused.code == 2
        assert "no tensor has room to be added" in refused.err
    assert bytes_of(base) == before
    lt.merge(base, adapter, tmp_path / "elsewhere", ties="both")
    ended = invoke("merge", base, adapter, "--in-place", "--tied")
    assert ended.code == 0
    assert bytes_of(base) == bytes_of(tmp_path / "elsewhere") != before


@pytest.mark.parametrize("side", [EMBED, HEAD])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_one_side_of_a_tie_comes_out_again(tmp_path: Path, side: str, stored: str) -> None:
    """Without a receipt too: merged with --tied, or the config would not say that they are tied."""
    state = tied_state()
    state = {name: value.float() for name, value in state.items()}
    if stored == "twice":
        state["lm_head.weight"] = state[f"{EMBED}.weight"].clone()
    base = save_folder(state, tmp_path / "base", TIED)
    adapter = save_sides(tmp_path / "adapter", {side: factors(50, 24)})
    lt.merge(base, adapter, tmp_path / "merged", ties="both")
    report = lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert any("changes with it" in note for note in report.facts["notes"])
    back = load_folder(tmp_path / "back")
    assert back.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(back[name], value)


def test_swap_of_one_side_of_a_tie(tmp_path: Path) -> None:
    """--tied and --exclude are for what is added, as for merge."""
    base = save_folder(tied_state(), tmp_path / "base", TIED)
    old = save_linear(tmp_path / "old", {Q0: factors(24, 24)})
    new = save_sides(tmp_path / "new", {HEAD: factors(50, 24)})
    pairs = {Q0: factors(24, 24, seed=4), DOWN1: factors(24, 40)}
    more = save_linear(tmp_path / "more", pairs)
    merged = tmp_path / "merged"
    lt.merge(base, old, merged, receipt=True)
    with pytest.raises(DisagreementError, match=r"changes lm_head\.weight alone"):
        lt.swap(merged, old, new, tmp_path / "no")
    lt.swap(merged, old, [new, more], tmp_path / "tied", tied=True)
    lt.merge(base, [new, more], tmp_path / "same", ties="both", receipt=True)
    assert bytes_of(tmp_path / "tied") == bytes_of(tmp_path / "same")
    lt.swap(merged, old, more, tmp_path / "part", exclude=["down_proj"])
    lt.merge(base, more, tmp_path / "likewise", exclude=["down_proj"], receipt=True)
    assert bytes_of(tmp_path / "part") == bytes_of(tmp_path / "likewise")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model_1."])
def test_a_tie_behind_a_prefix_is_one(tmp_path: Path, prefix: str) -> None:
    """Its head was taken for one that is not stored, and stayed as it was."""
    state = {name: value.float() for name, value in tied_state().items()}
    state["lm_head.weight"] = state[f"{EMBED}.weight"].clone()
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    base = save_folder(wrapped, tmp_path / "base", TIED)
    new = torch.randn(50, 24)
    both = replacing(tmp_path / "both", **{f"{EMBED}.weight": new, f"{HEAD}.weight": new.clone()})
    lt.merge(base, both, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert all(torch.equal(merged[f"{prefix}{side}.weight"], new) for side in (EMBED, HEAD))
    alone = save_sides(tmp_path / "alone", {HEAD: factors(50, 24)})
    with pytest.raises(DisagreementError, match=r"changes .*lm_head\.weight alone"):
        lt.merge(base, alone, tmp_path / "no")
    lt.merge(base, alone, tmp_path / "tied", ties="both")
    tied = load_folder(tmp_path / "tied")
    assert torch.equal(*(tied[f"{prefix}{side}.weight"] for side in (EMBED, HEAD)))
