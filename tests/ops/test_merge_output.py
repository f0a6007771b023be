"""The form of a merge's output: dtypes, shards, links, config, several adapters."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loratool as lt
from loratool.errors import DisagreementError, RangeOverflow, UnsupportedInput, UsageError
from tests.algebra.reference import exact_merge, same_bits
from tests.builders import relative_paths
from tests.ops.builders import LLAMA, llama_like, load_folder, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def nearest(value: float, dtype: torch.dtype) -> float:
    """The nearest value of a 16-bit dtype to a finite number, ties to even, by comparing all."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).double()
    every = every[torch.isfinite(every)]
    distance = [
        (abs(Fraction(float(x)) - Fraction(value)), x) for x in every[_close(every, value)].tolist()
    ]
    best = min(d for d, _ in distance)
    tied = {x for d, x in distance if d == best}
    even = [x for x in tied if not torch.tensor(x).to(dtype).view(torch.int16).item() & 1]
    return float(even[0] if len(tied) > 1 else next(iter(tied)))


def _close(every: Tensor, value: float) -> Tensor:
    return torch.argsort((every - value).abs())[:6]


@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_gets_the_dtype_by_one_rounding(
    tmp_path: Path, stored: torch.dtype, asked: str
) -> None:
    state = llama_like(stored)
    state["steps"] = torch.arange(3)
    base = save_folder(state, tmp_path / "base", LLAMA | {"dtype": "float32"}, shards=2)
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b)}, lora_alpha=16)
    lt.merge(base, adapter, tmp_path / "merged", dtype=asked)
    merged, dtype = load_folder(tmp_path / "merged"), DTYPES[asked]
    for name, value in state.items():
        if name == f"{Q0}.weight":
            expected = exact_merge(value, [(b, a, 16 / 3)], dtype)
        else:
            expected = value.to(dtype) if name != "steps" else value
        assert same_bits(merged[name], expected), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == LLAMA | {"dtype": asked}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_float64_is_rounded_once(tmp_path: Path, asked: str) -> None:
    """Values just beside the middle between two neighbours, where float32 on the way is wrong."""
    middle = 1 + 2.0 ** (-11 if asked == "float16" else -8)
    values = [middle, middle * (1 + 2**-40), middle * (1 - 2**-40), -middle, 1 / 3, 2.0**-24, 0.0]
    state = llama_like(torch.float32)
    state["table"] = torch.tensor(values, dtype=torch.float64)
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(base, adapter, tmp_path / "merged", dtype=asked)
    got = load_folder(tmp_path / "merged")["table"].double().tolist()
    assert got == [nearest(value, DTYPES[asked]) for value in values]
    assert got[1] != got[2]


def test_a_dtype_too_narrow_is_an_error_and_infinity_is_none(tmp_path: Path) -> None:
    state = llama_like(torch.float32)
    state["mask"] = torch.tensor([float("-inf"), float("nan"), 1.0])
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    base = save_folder(state, tmp_path / "base", LLAMA)
    lt.merge(base, adapter, tmp_path / "merged", dtype="float16")
    mask = load_folder(tmp_path / "merged")["mask"]
    assert mask[0] == float("-inf")
    assert mask[1].isnan()
    state["mask"][2] = 65520.0
    base = save_folder(state, tmp_path / "large", LLAMA)
    with pytest.raises(RangeOverflow, match="mask: 1 value exceeds the range of F16"):
        lt.merge(base, adapter, tmp_path / "out", dtype="float16")
    state["mask"] = torch.zeros(3).to(torch.float8_e4m3fn)
    base = save_folder(state, tmp_path / "eight", LLAMA)
    with pytest.raises(UnsupportedInput, match="mask: is stored as F8_E4M3"):
        lt.merge(base, adapter, tmp_path / "out", dtype="float16")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        lt.merge(base, adapter, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_new_shards_as_transformers_would_make_them(tmp_path: Path) -> None:
    """Named, indexed and sized as huggingface_hub splits the same tensors."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(base, adapter, tmp_path / "whole")
    lt.merge(base, adapter, tmp_path / "split", max_shard_size="4KB")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    stored = load_file(base / "model.safetensors")
    order = {name: stored[name] for name in stored}
    theirs = split_torch_state_dict_into_shards(order, max_shard_size="4KB")
    assert len(set(index["weight_map"].values())) == len(theirs.filename_to_tensors)
    assert set(index["weight_map"].values()) == set(theirs.filename_to_tensors)
    assert index["metadata"]["total_size"] == theirs.metadata["total_size"]
    whole, split = load_folder(tmp_path / "whole"), load_folder(tmp_path / "split")
    assert whole.keys() == split.keys() == index["weight_map"].keys()
    assert all(same_bits(whole[name], split[name]) for name in whole)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "split" / file)
    lt.merge(tmp_path / "split", adapter, tmp_path / "joined", scale=-1.0, max_shard_size="1GB")
    assert "model.safetensors" in relative_paths(tmp_path / "joined")
    assert "model.safetensors.index.json" not in relative_paths(tmp_path / "joined")


def test_a_shard_size_that_is_none_or_does_not_fit(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA) / "model.safetensors"
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    with pytest.raises(UsageError, match="unknown size 'big'"):
        lt.merge(base, adapter, tmp_path / "out", max_shard_size="big")
    with pytest.raises(UsageError, match="is one file, --max-shard-size makes"):
        lt.merge(base, adapter, tmp_path / "out.safetensors", max_shard_size="4KB")


def test_a_diffusers_pickle_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    torch.save({f"{Q0}.weight": torch.ones(24, 24)}, folder / "diffusion_pytorch_model.bin")
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    lt.merge(folder, adapter, tmp_path / "merged")
    assert relative_paths(tmp_path / "merged") == ["diffusion_pytorch_model.safetensors"]


def test_adapters_with_weights_are_summed_before_rounding(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    (a, b), (a2, b2) = factors(24, 24), factors(24, 24, rank=2, seed=8)
    one = save_peft(tmp_path / "one", {Q0: (a, b)}, lora_alpha=16)
    two = save_peft(tmp_path / "two", {Q0: (a2, b2), DOWN1: factors(24, 40, 2)}, lora_alpha=1)
    report = lt.merge(base, [(one, 0.7), (two, -0.3)], tmp_path / "merged", scale=2.0)
    terms = [(b, a, 16 / 3 * (0.7 * 2.0)), (b2, a2, 0.5 * (-0.3 * 2.0))]
    merged = load_folder(tmp_path / "merged")
    name = f"{Q0}.weight"
    assert same_bits(merged[name], exact_merge(state[name], terms, torch.bfloat16))
    assert [row.name for row in report.rows] == [name, f"{DOWN1}.weight"]
    assert [one["weight"] for one in report.facts["adapters"]] == [0.7, -0.3]
    again = lt.merge(base, [(one, 1.0), (one, -1.0)], tmp_path / "nothing")
    assert again.total("changed") == 0
    assert same_bits(load_folder(tmp_path / "nothing")[name], state[name])


def test_links_are_made_for_what_stays(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA, shards=3)
    (base / "tokenizer.json").write_text("{}")
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    lt.merge(base, adapter, tmp_path / "linked", link=True)
    lt.merge(base, adapter, tmp_path / "copied")
    linked = {p.name for p in base.iterdir() if (tmp_path / "linked" / p.name).samefile(p)}
    changed = json.loads(before["model.safetensors.index.json"])["weight_map"][f"{Q0}.weight"]
    assert linked == set(before) - {changed, "model.safetensors.index.json"}
    for name in before:
        assert not (tmp_path / "copied" / name).samefile(base / name)
        copied = (tmp_path / "copied" / name).read_bytes()
        assert copied == (tmp_path / "linked" / name).read_bytes()
    assert before == {path.name: path.read_bytes() for path in base.iterdir()}


def test_traces_of_an_adapter_leave_the_config(tmp_path: Path) -> None:
    config: dict[str, object] = LLAMA | {"peft_config": {"r": 3}, "name": "é"}
    base = save_folder(llama_like(), tmp_path / "base", config)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    report = lt.merge(base, adapter, tmp_path / "merged")
    text = (tmp_path / "merged" / "config.json").read_text()
    assert json.loads(text) == LLAMA | {"name": "é"}
    assert any("peft_config" in note for note in report.facts["notes"])


def test_the_base_is_compared_with_what_the_adapter_records(tmp_path: Path) -> None:
    state = llama_like()
    base = save_folder(state, tmp_path / "base", LLAMA | {"_name_or_path": "owner/model"})
    other = save_folder(state, tmp_path / "other", LLAMA | {"_name_or_path": "owner/other"}, 2)
    tuned = {name: value + 0.1 for name, value in state.items()}
    lt.extract(base, save_folder(tuned, tmp_path / "tuned", LLAMA), tmp_path / "made", rank=2)
    out = tmp_path / "out"
    assert lt.merge(base, tmp_path / "made", out, base_check=True).facts["notes"] == []
    notes = lt.merge(other, tmp_path / "made", out, overwrite=True).facts["notes"]
    assert len(notes) == 2
    assert "made for owner/model, the base's config says owner/other" in notes[0]
    assert "other headers or sizes" in notes[1]
    with pytest.raises(DisagreementError, match="not an adapter of this base"):
        lt.merge(other, tmp_path / "made", out, base_check=True, overwrite=True)
    plain = save_peft(tmp_path / "plain", {Q0: factors(24, 24)})
    with pytest.raises(DisagreementError, match="records nothing"):
        lt.merge(base, plain, out, base_check=True, overwrite=True)
    assert lt.merge(base, plain, out, overwrite=True).facts["notes"] == []


BAD = json.dumps({"base": {"samples": {f"{Q0}.weight": 7, "x": "F32:", "y": "BF16:0"}}})


@pytest.mark.parametrize("large", [False, True])
def test_a_base_of_the_same_form_and_other_values_is_said(tmp_path: Path, large: bool) -> None:
    """A base and its sibling share names, headers and sizes."""
    state = llama_like(torch.bfloat16)
    if large:
        state[f"{Q0}.weight"] = torch.randn(600, 24, generator=torch.Generator()).bfloat16()
    base = save_folder(state, tmp_path / "base", LLAMA)
    tuned = state | {f"{Q0}.weight": state[f"{Q0}.weight"] + 0.1}
    lt.extract(base, save_folder(tuned, tmp_path / "tuned", LLAMA), tmp_path / "made", rank=2)
    out, made = tmp_path / "out", tmp_path / "made"
    sibling = save_folder(tuned, tmp_path / "sibling", LLAMA)
    (note,) = lt.merge(sibling, made, out).facts["notes"]
    assert "other values than in the base it was made for in 1 of 1 tensor that it changes" in note
    assert f"{Q0}.weight" in note
    with pytest.raises(DisagreementError, match="not an adapter of this base"):
        lt.merge(sibling, made, out, base_check=True, overwrite=True)
    untouched = tuned | {f"{Q0}.weight": state[f"{Q0}.weight"]}
    untouched["model.norm.weight"] = untouched["model.norm.weight"] + 1
    other = save_folder(untouched, tmp_path / "other", LLAMA)
    assert lt.merge(other, made, out, base_check=True, overwrite=True).facts["notes"] == []
    wide = save_folder({n: v.float() for n, v in state.items()}, tmp_path / "wide", LLAMA)
    (note,) = lt.merge(wide, made, out, overwrite=True).facts["notes"]
    assert "other headers" in note


def test_a_recorded_base_may_be_nonsense(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    for text in ("{", "[]", '{"base": 3}', '{"base": {"fingerprint": 7}}', BAD):
        (adapter / "loratool_report.json").write_text(text)
        assert lt.merge(base, adapter, tmp_path / "out", overwrite=True).facts["notes"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_swallows(tmp_path: Path, dtype: torch.dtype) -> None:
    """‖M − Y‖²/‖Y − W0‖² against float64; all of an update that is too small to change anything."""
    state = llama_like(dtype)
    base = save_folder(state, tmp_path / "base", LLAMA)
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b), DOWN1: factors(24, 40)})
    for scale in (1.0, 1e-3, 1e-9):
        out = tmp_path / f"{scale}"
        report = lt.merge(base, adapter, out, scale=scale, lost=True)
        row = next(row for row in report.rows if row.name == f"{Q0}.weight")
        update = scale * 2.0 * b.double() @ a.double()
        change = load_folder(out)[row.name].double() - state[row.name].double()
        expected = float((change - update).square().sum() / update.square().sum())
        assert row.lost_share == pytest.approx(expected, rel=1e-4)
        assert report.lost_share is not None
        assert 0 < report.lost_share <= 1
        if scale == 1e-9:
            assert row.changed == 0
            assert row.lost_share == pytest.approx(1, rel=1e-4)
    totals = report.to_json()["totals"]
    assert totals["lost_share"] == report.lost_share
    unasked = lt.merge(base, adapter, tmp_path / "unasked")
    assert unasked.lost_share is None
    assert unasked.to_json()["tensors"][0]["lost_share"] is None


def test_overflow_is_counted_where_it_is_allowed(tmp_path: Path) -> None:
    state = llama_like(torch.float16)
    state["wide"] = torch.tensor([1.0, 1e6, -1e6])
    base = save_folder(state, tmp_path / "base", LLAMA)
    a, b = factors(24, 24)
    adapter = save_peft(tmp_path / "adapter", {Q0: (a, b)})
    with pytest.raises(RangeOverflow) as refused:
        lt.merge(base, adapter, tmp_path / "out", scale=1e7)
    assert "--allow-overflow" in str(refused.value.hint)
    options = {"scale": 1e7, "dtype": "float16", "allow_overflow": True, "lost": True}
    report = lt.merge(base, adapter, tmp_path / "out", **options)  # type: ignore[arg-type]
    merged = load_folder(tmp_path / "out")
    exact = state[f"{Q0}.weight"].double() + 2e7 * b.double() @ a.double()
    assert {row.name: row.overflowed for row in report.rows} == {
        f"{Q0}.weight": int((exact.abs() >= 65520).sum()),
        "wide": 2,
    }
    assert torch.equal(torch.isinf(merged[f"{Q0}.weight"]), exact.abs() >= 65520)
    assert merged["wide"].tolist() == [1.0, float("inf"), float("-inf")]
    assert report.to_json()["totals"]["overflowed"] == report.total("overflowed") > 2


def test_a_link_to_nothing_is_said(tmp_path: Path) -> None:
    """A cache that was pruned: the tokenizer is a link, and its file is gone."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA)
    (base / "tokenizer.json").symlink_to(tmp_path / "gone")
    adapter = save_peft(tmp_path / "adapter", {Q0: factors(24, 24)})
    report = lt.merge(base, adapter, tmp_path / "merged", receipt=True)
    assert report.facts["notes"] == ["left out: tokenizer.json, a link to a file that is not there"]
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
    lt.unmerge(tmp_path / "merged", adapter, tmp_path / "back")
