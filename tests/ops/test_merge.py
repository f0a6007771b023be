"""Merging: the right tensors, the right bytes, everything else untouched."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import loratool as lt
from loratool.adapter import LowRankUpdate
from loratool.engine import Engine
from loratool.errors import (
    DisagreementError,
    NonFiniteValues,
    NothingMatches,
    OutputError,
    RangeOverflow,
    ShapeMismatch,
    UsageError,
)
from loratool.layouts.placing import PlacedUpdate
from loratool.ops.merge import plan_merge, run_merge
from loratool.ops.rounders import rounder_of
from loratool.storage.tensors import MemoryTensor
from tests.algebra.reference import exact_merge, same_bits
from tests.ops.builders import (
    GPT2,
    LLAMA,
    gpt2_like,
    llama_like,
    load_folder,
    save_folder,
    save_peft,
)

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def factors(rows: int, columns: int, rank: int = 3, seed: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator) * 0.1
    return a, torch.randn(rows, rank, generator=generator) * 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_is_correctly_rounded(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    state = llama_like(dtype)
    base = save_folder(state, tmp_path / "base", LLAMA, shards)
    chosen = {Q0: factors(24, 24), DOWN1: factors(24, 40)}
    adapter = save_peft(tmp_path / "adapter", chosen, lora_alpha=16)
    report = lt.merge(base, adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert set(merged) == set(state)
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module in chosen:
            a, b = chosen[module]
            assert same_bits(merged[name], exact_merge(value, [(b, a, 16 / 3)], dtype))
        else:
            assert same_bits(merged[name], value)
    assert {row.name for row in report.rows} == {f"{module}.weight" for module in chosen}
    assert report.total("elements") == 24 * 24 + 24 * 40


def test_files_are_the_bases(tmp_path: Path) -> None:
    """Headers, shards, index, metadata and side files come through byte for byte."""
    base = save_folder(llama_like(), tmp_path / "base", LLAMA, shards=2)
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "sub").mkdir()
    (base / "sub" / "extra.txt").write_text("kept")
    (base / "pytorch_model.bin").write_bytes(b"stale weights")
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    report = lt.merge(base, adapter, tmp_path / "merged")
    expected = {str(p.relative_to(base)) for p in base.rglob("*")} - {"pytorch_model.bin"}
    assert {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*")} == (
        expected
    )
    assert report.facts["skipped_files"] == ["pytorch_model.bin"]
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "sub/extra.txt"):
        assert (base / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    for shard in base.glob("*.safetensors"):
        ours, theirs = (tmp_path / "merged" / shard.name).read_bytes(), shard.read_bytes()
        length = int.from_bytes(theirs[:8], "little")
        assert ours[: 8 + length] == theirs[: 8 + length]
        with safe_open(tmp_path / "merged" / shard.name, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_conv1d_is_transposed_even_where_square(tmp_path: Path) -> None:
    state = gpt2_like()
    base = save_folder(state, tmp_path / "base", GPT2)
    chosen = {"h.0.attn.c_proj": factors(16, 16), "h.1.attn.c_attn": factors(48, 16)}
    adapter = save_peft(tmp_path / "adapter", chosen, lora_alpha=3, fan_in_fan_out=True)
    lt.merge(base, adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    for module, (a, b) in chosen.items():
        name = f"{module}.weight"
        assert same_bits(merged[name], exact_merge(state[name], [(a.T, b.T, 1.0)], torch.float32))


@pytest.mark.parametrize(
    ("base_prefix", "adapter_prefix"), [("transformer.", ""), ("", "transformer.")]
)
def test_prefix_may_differ_and_is_said(
    tmp_path: Path, base_prefix: str, adapter_prefix: str
) -> None:
    state = gpt2_like(prefix=base_prefix)
    base = save_folder(state, tmp_path / "base", GPT2)
    a, b = factors(64, 16)
    adapter = save_peft(tmp_path / "adapter", {f"{adapter_prefix}h.0.mlp.c_fc": (a, b)})
    report = lt.merge(base, adapter, tmp_path / "merged")
    name = f"{base_prefix}h.0.mlp.c_fc.weight"
    merged = load_folder(tmp_path / "merged")
    assert same_bits(merged[name], exact_merge(state[name], [(a.T, b.T, 2.0)], torch.float32))
    assert "prefix 'transformer.'" in report.facts["notes"][0]


def test_without_config_the_biases_testify(tmp_path: Path) -> None:
    """c_attn's bias shows that weights are (in, out), so the square c_proj is transposed too."""
    state = gpt2_like()
    base = save_folder(state, tmp_path / "base", config=None)
    a, b = factors(16, 16)
    adapter = save_peft(tmp_path / "adapter", {"h.0.attn.c_proj": (a, b)})
    lt.merge(base, adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")["h.0.attn.c_proj.weight"]
    expected = exact_merge(state["h.0.attn.c_proj.weight"], [(a.T, b.T, 2.0)], torch.float32)
    assert same_bits(merged, expected)


def test_scale_multiplies_the_adapters_own(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA)
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b)}, lora_alpha=3, use_rslora=True)
    lt.merge(base, adapter, tmp_path / "merged", scale=0.5)
    expected = exact_merge(state[f"{Q0}.weight"], [(b, a, 3 / 3**0.5 * 0.5)], torch.float32)
    assert same_bits(load_folder(tmp_path / "merged")[f"{Q0}.weight"], expected)


def test_workers_and_job_sizes_do_not_change_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24), DOWN1: factors(24, 40)})
    results = []
    for index, (workers, job, block) in enumerate([(1, 2**27, 2**18), (4, 300, 50), (2, 99, 1)]):
        monkeypatch.setattr("loratool.ops.merge_work.JOB_BYTES", job)
        monkeypatch.setattr("loratool.ops.merge_jobs.BLOCK_ELEMENTS", block)
        out = tmp_path / f"merged{index}"
        run_merge(plan_merge(base, [(adapter, 1.0)], out), Engine(workers))
        results.append([path.read_bytes() for path in sorted(out.glob("*.safetensors"))])
    assert results[0] == results[1] == results[2]


def test_single_file_in_single_file_out(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA) / "model.safetensors"
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(base, adapter, tmp_path / "merged.safetensors")
    lt.merge(base.parent, adapter, tmp_path / "merged")
    assert (tmp_path / "merged.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_pickles_become_safetensors(tmp_path: Path, sharded: bool) -> None:
    state = llama_like(torch.float16)
    state["lm_head.weight"] = state["lm_head.weight"].T.contiguous().T  # stored transposed
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA))
    if sharded:
        names = list(state)
        files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        for i, file in enumerate(files):
            torch.save({n: state[n] for n in names[i::2]}, base / file)
        weight_map = {name: files[i % 2] for i, name in enumerate(names)}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, base / "pytorch_model.bin")
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b)})
    lt.merge(base, adapter, tmp_path / "merged")
    merged = load_folder(tmp_path / "merged")
    assert set(merged) == set(state)
    for name, value in state.items():
        expected = (
            exact_merge(value, [(b, a, 2.0)], torch.float16) if name == f"{Q0}.weight" else value
        )
        assert same_bits(merged[name], expected.contiguous())
    assert len(lt.open_checkpoint(tmp_path / "merged")) == len(state)
    assert not list((tmp_path / "merged").glob("*.bin*"))


def test_a_tied_pair_must_be_changed_on_both_sides(tmp_path: Path) -> None:
    state = gpt2_like(prefix="transformer.")
    base = save_folder(state, tmp_path / "base", GPT2)
    a, b = factors(40, 16)
    head_only = save_peft(tmp_path / "head", {"lm_head": (a, b)})
    with pytest.raises(DisagreementError, match=r"lm_head.weight alone.*wte"):
        lt.merge(base, head_only, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_refusals_name_the_tensor(tmp_path: Path) -> None:
    state = llama_like(torch.float16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    out = tmp_path / "out"
    wrong_name = save_peft(tmp_path / "a1", {"model.layers.7.self_attn.q_proj": factors(24, 24)})
    with pytest.raises(NothingMatches, match=r"match(es)? no tensor") as caught:
        lt.merge(base, wrong_name, out)
    assert "layers.7.self_attn.q_proj" in caught.value.details[0]
    assert "closest: model.layers." in caught.value.details[0]
    wrong_shape = save_peft(tmp_path / "a2", {Q0: factors(24, 25)})
    with pytest.raises(ShapeMismatch, match=r"q_proj.*\[24, 25\].*\[24, 24\]"):
        lt.merge(base, wrong_shape, out)
    a, b = factors(24, 24)
    loud = save_peft(tmp_path / "a3", {Q0: (a * 1e6, b)})
    with pytest.raises(RangeOverflow, match=r"q_proj.*F16"):
        lt.merge(base, loud, out)
    broken = save_peft(tmp_path / "a4", {Q0: (a * float("nan"), b)})
    with pytest.raises(NonFiniteValues, match="q_proj"):
        lt.merge(base, broken, out)
    state[f"{DOWN1}.weight"][3, 5] = float("inf")
    sick = save_folder(state, tmp_path / "sick", LLAMA)
    with pytest.raises(NonFiniteValues, match=r"down_proj.weight.*\[3, 5\]"):
        lt.merge(sick, save_peft(tmp_path / "a5", {DOWN1: factors(24, 40)}), out)
    assert not out.exists()
    assert sorted(os.listdir(tmp_path)) == ["a1", "a2", "a3", "a4", "a5", "base", "sick"]


def test_include_exclude_and_scale_of_replacements(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24), DOWN1: factors(24, 40)})
    report = lt.merge(base, adapter, tmp_path / "m1", exclude=["mlp"])
    assert [row.name for row in report.rows] == [f"{Q0}.weight"]
    assert report.facts["left_out"] == [f"{DOWN1}.weight"]
    with pytest.raises(NothingMatches, match="'attn' matches nothing"):
        lt.merge(base, adapter, tmp_path / "m2", include=["attn"])
    tuned = {name: value + 0.1 for name, value in llama_like().items()}
    lt.extract(base, save_folder(tuned, tmp_path / "tuned", LLAMA), tmp_path / "whole", rank=2)
    with pytest.raises(UsageError, match=r"--scale 0.5 does not apply"):
        lt.merge(base, tmp_path / "whole", tmp_path / "m2", scale=0.5)


def test_symlinked_shards_work_and_stay_untouched(tmp_path: Path) -> None:
    """The Hub cache is made of links into blobs/."""
    real = save_folder(llama_like(), tmp_path / "blobs", LLAMA)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in real.iterdir()}
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(snapshot, adapter, tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    assert before == {path.name: path.read_bytes() for path in real.iterdir()}


def test_no_file_of_an_input_is_ever_the_output(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA, shards=2)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    shard = base / "model-00001-of-00002.safetensors"
    index = base / "model.safetensors.index.json"
    before = {path: path.read_bytes() for path in base.iterdir()}
    for named, target in [(index, shard), (index, index), (base, shard), (base, base)]:
        with pytest.raises(OutputError):
            lt.merge(named, adapter, target, overwrite=True)
    assert before == {path: path.read_bytes() for path in base.iterdir()}


def test_two_adapters_on_one_tensor_are_rounded_once() -> None:
    """Both are added to the base before anything is rounded; where they cancel, the base stays."""
    base, (a, b), (a2, b2) = llama_like(torch.bfloat16), factors(24, 24), factors(24, 24, seed=5)
    name = f"{Q0}.weight"
    placed = [
        PlacedUpdate(
            name, name, LowRankUpdate(MemoryTensor(y), MemoryTensor(x), 2.0, 6.0), weight=w
        )
        for x, y, w in ((a, b, 0.7), (a2, b2, -0.3))
    ]
    tensor = MemoryTensor(base[name])

    def merged(updates: list[PlacedUpdate]) -> torch.Tensor:
        rounder = rounder_of(updates, tensor, 0, 24, device=torch.device("cpu"))
        return rounder.add_to(base[name], 0, torch.bfloat16).values

    terms = [(b, a, 2.0 * 0.7), (b2, a2, 2.0 * -0.3)]
    assert same_bits(merged(placed), exact_merge(base[name], terms, torch.bfloat16))
    assert same_bits(merged([placed[0], replace(placed[0], weight=-0.7)]), base[name])
