"""swap: what unmerge and then merge give, receipt included, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.errors import DisagreementError, InputMissing, OutputError, UsageError
from loratool.ops.verify_report import EXACT
from loratool.receipt import RECEIPT_FILE
from tests.builders import snapshot
from tests.ops.builders import (
    GPT2,
    LLAMA,
    gpt2_like,
    llama_like,
    moved,
    save_folder,
    save_peft,
)
from tests.ops.test_merge import DOWN1, Q0, factors

UP1 = "model.layers.1.mlp.up_proj"


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """base/, old/, new/, merged/ (old in base) in bf16; new shares one module with old."""
    base = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=2)
    old = save_peft(tmp_path / "old", {Q0: factors(24, 24), DOWN1: factors(24, 40)}, lora_alpha=16)
    save_peft(tmp_path / "new", {Q0: factors(24, 24, seed=8), UP1: factors(40, 24)}, lora_alpha=5)
    lt.merge(base, old, tmp_path / "merged", receipt=True)
    return tmp_path


def test_a_swap_is_an_unmerge_and_a_merge(made: Path) -> None:
    report = lt.swap(made / "merged", made / "old", [(made / "new", 0.8)], made / "swapped")
    lt.unmerge(made / "merged", made / "old", made / "between")
    lt.merge(made / "between", [(made / "new", 0.8)], made / "expected", receipt=True)
    assert everything(made / "swapped") == everything(made / "expected")
    assert {row.name for row in report.merged.rows} == {f"{Q0}.weight", f"{UP1}.weight"}
    lt.unmerge(made / "swapped", [(made / "new", 0.8)], made / "back")
    assert everything(made / "back") == everything(made / "base")


def test_there_and_back_again(made: Path) -> None:
    lt.swap(made / "merged", made / "old", made / "new", made / "swapped")
    lt.swap(made / "swapped", made / "new", made / "old", made / "again")
    assert everything(made / "again") == everything(made / "merged")


def test_replaced_parameters(tmp_path: Path) -> None:
    state = gpt2_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", GPT2)
    for name, seed in (("old", 1), ("new", 2)):
        tuned = save_folder(moved(state, seed=seed), tmp_path / f"tuned-{name}", GPT2)
        lt.extract(base, tuned, tmp_path / name, rank=3)
    lt.merge(base, tmp_path / "old", tmp_path / "merged", receipt=True)
    lt.swap(tmp_path / "merged", tmp_path / "old", tmp_path / "new", tmp_path / "swapped")
    lt.merge(base, tmp_path / "new", tmp_path / "expected", receipt=True)
    assert everything(tmp_path / "swapped") == everything(tmp_path / "expected")


def test_single_files(tmp_path: Path) -> None:
    base = save_folder(llama_like(torch.float16), tmp_path / "base") / "model.safetensors"
    old = save_peft(tmp_path / "old", {Q0: factors(24, 24)})
    new = save_peft(tmp_path / "new", {Q0: factors(24, 24, seed=2)})
    lt.merge(base, old, tmp_path / "m.safetensors", receipt=True)
    lt.swap(tmp_path / "m.safetensors", old, new, tmp_path / "s.safetensors")
    lt.merge(base, new, tmp_path / "expected.safetensors")
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "s.safetensors").read_bytes() == expected
    lt.unmerge(tmp_path / "s.safetensors", new, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_refusals_write_nothing(made: Path) -> None:
    lt.merge(made / "base", made / "old", made / "bare")
    lt.merge(made / "base", made / "old", made / "wide", dtype="float32", receipt=True)
    before = snapshot(made)
    merged, old, new, out = (made / name for name in ("merged", "old", "new", "out"))
    with pytest.raises(InputMissing, match="has no receipt"):
        lt.swap(made / "bare", old, new, out)
    with pytest.raises(UsageError, match="changed dtypes, shards"):
        lt.swap(made / "wide", old, new, out)
    with pytest.raises(UsageError, match="no adapter to add"):
        lt.swap(merged, old, [], out)
    with pytest.raises(DisagreementError, match="is not the adapter 'old'"):
        lt.swap(merged, new, old, out)
    with pytest.raises(OutputError):
        lt.swap(merged, old, new, new)
    assert snapshot(made) == before


def test_values_that_changed_since(made: Path) -> None:
    path = next((made / "merged").glob("model-00002*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DisagreementError, match="not those that the receipt was made for"):
        lt.swap(made / "merged", made / "old", made / "new", made / "out")
    assert not (made / "out").exists()


def test_config_files_come_along(made: Path) -> None:
    (made / "merged" / "tokenizer.json").write_text(json.dumps({"a": 1}))
    lt.swap(made / "merged", made / "old", made / "new", made / "swapped")
    assert (made / "swapped" / "tokenizer.json").is_file()
    assert (made / "swapped" / RECEIPT_FILE).is_file()


def test_a_new_adapter_of_the_same_base_is_no_cause_for_a_note(tmp_path: Path) -> None:
    """It records samples of the base, which the merged checkpoint does not hold."""
    state = llama_like(torch.bfloat16)
    base = save_folder(state, tmp_path / "base", LLAMA)
    name = "model.layers.0.self_attn.q_proj.weight"
    for index in (1, 2):
        tuned = save_folder(state | {name: state[name] + index}, tmp_path / f"t{index}", LLAMA)
        lt.extract(base, tuned, tmp_path / f"a{index}", rank=1)
    lt.merge(base, tmp_path / "a1", tmp_path / "merged", receipt=True)
    report = lt.swap(tmp_path / "merged", tmp_path / "a1", tmp_path / "a2", tmp_path / "out")
    assert report.facts["notes"] == []


def test_an_adapter_without_alpha_for_one_that_stores_it(made: Path) -> None:
    """--alpha is for those that need it, on whichever side they are."""
    b, a = torch.randn(24, 4) * 0.1, torch.randn(4, 24) * 0.1
    theirs = made / "lora.pt"
    torch.save({f"{Q0}.lora_A": a, f"{Q0}.lora_B": b}, theirs)
    lt.swap(made / "merged", made / "old", theirs, made / "swapped", alpha=8)
    lt.merge(made / "base", theirs, made / "expected", alpha=8, receipt=True)
    assert everything(made / "swapped") == everything(made / "expected")
    lt.swap(made / "swapped", theirs, made / "old", made / "again", alpha=8)
    assert everything(made / "again") == everything(made / "merged")
    with pytest.raises(UsageError, match="stores its own alpha"):
        lt.swap(made / "merged", made / "old", made / "new", made / "no", alpha=8)

    both = [(theirs, 0.5), (made / "new", 1.0)]
    lt.merge(made / "base", both, made / "both", alpha=8, receipt=True)
    assert lt.verify(made / "both", made / "base", both, alpha=8).verdict == EXACT
    lt.unmerge(made / "both", both, made / "back", alpha=8)
    assert everything(made / "back") == everything(made / "base")
