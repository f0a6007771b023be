"""Merging into the base's own files, and what may go wrong meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratool as lt
from loratool.errors import (
    DisagreementError,
    MalformedFile,
    NonFiniteValues,
    OutputError,
    UnsupportedInput,
)
from loratool.ops import merge_in_place
from loratool.storage.in_place import Journal
from loratool.storage.journal_holder import JOURNAL
from tests.cli.invoke import invoke
from tests.faults.killing import bytes_of
from tests.ops.builders import GPT2, LLAMA, gpt2_like, llama_like, save_folder, save_peft
from tests.ops.test_merge import DOWN1, Q0, factors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = save_folder(llama_like(torch.bfloat16), tmp_path / "base", LLAMA, shards=3)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_peft(tmp_path / "adapter", {Q0: factors(24, 24), DOWN1: factors(24, 40)})


@pytest.mark.parametrize("block", [100, 2**24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_bytes_as_a_merge_elsewhere(
    tmp_path: Path, adapter: Path, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", block)
    base = save_folder(llama_like(dtype), tmp_path / "base", LLAMA, shards=2)
    whole = lt.merge(base, [(adapter, 0.5)], tmp_path / "merged", scale=3.0)
    report = lt.merge_in_place(base, [(adapter, 0.5)], scale=3.0)
    assert bytes_of(base) == bytes_of(tmp_path / "merged")
    assert report.rows == whole.rows
    assert report.facts["in_place"] is True


def test_a_linked_base_is_not_touched(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = bytes_of(base)
    lt.merge(base, adapter, tmp_path / "linked", link=True)
    lt.merge_in_place(tmp_path / "linked", [(adapter, -1.0)])
    links = tmp_path / "links"
    links.mkdir()
    for path in base.iterdir():
        (links / path.name).symlink_to(path)
    lt.merge_in_place(links, adapter)
    assert bytes_of(base) == before


def test_a_single_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    one = save_folder(llama_like(), tmp_path / "one", LLAMA) / "model.safetensors"
    lt.merge(one, adapter, tmp_path / "merged.safetensors")
    lt.merge_in_place(one, adapter)
    assert one.read_bytes() == (tmp_path / "merged.safetensors").read_bytes()


def test_what_cannot_be_changed_in_place(base: Path, adapter: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(llama_like(), pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedInput, match="torch pickle, which cannot be changed in place"):
        lt.merge_in_place(pickled, adapter)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    (base / "sub").mkdir()
    name = "model-00001-of-00003.safetensors"
    (base / name).rename(base / "sub" / name)
    weights = {k: v if v != name else f"sub/{name}" for k, v in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UnsupportedInput, match="subfolder"):
        lt.merge_in_place(base, adapter)


def test_a_value_that_cannot_be_merged_puts_everything_back(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 100)
    state = llama_like()
    state[f"{DOWN1}.weight"][20, 5] = float("nan")
    base = save_folder(state, tmp_path / "base", LLAMA)
    before = bytes_of(base)
    with pytest.raises(NonFiniteValues, match="down_proj") as failed:
        lt.merge_in_place(base, adapter, jobs=1)
    assert failed.value.__notes__ == ["everything was put back as it was"]
    assert bytes_of(base) == before


def interrupted(
    base: Path, adapter: Path, after: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Leave a journal as a process does that is killed after some blocks."""
    original, done = Journal.change, []

    def change(self: Journal, *words: Any) -> Any:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(original(self, *words))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(merge_in_place, "WAITING", 0)
        patch.setattr(merge_in_place, "BLOCK_BYTES", 100)
        patch.setattr(Journal, "change", change)
        patch.setattr(Journal, "undo", lambda *_: (_ for _ in ()).throw(OSError()))
        with pytest.raises(KeyboardInterrupt):
            lt.merge_in_place(base, adapter, jobs=1, **options)
    assert (base / JOURNAL).exists()


def test_every_command_refuses_and_recover_says_what_it_found(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(base)
    assert invoke("recover", base).out == f"{base}: nothing to recover\n"
    interrupted(base, adapter, 3, monkeypatch)
    kept = bytes_of(base)
    for command in (
        ("merge", base, adapter, "-o", tmp_path / "out"),
        ("merge", base, adapter, "--in-place"),
        ("inspect", base),
        ("extract", base, tmp_path / "base", "-o", tmp_path / "out"),
    ):
        ended = invoke(*command)
        assert ended.code == 3, command
        assert "was being changed in place" in ended.err
        assert f"loratool recover {base}" in ended.err
    replaced = invoke("merge", adapter, adapter, "-o", base, "--overwrite")
    assert replaced.code != 0
    found = invoke("recover", base)
    assert found.code == 1
    assert f"merge --in-place of {adapter}:1 was interrupted" in found.out
    assert "3 of" in found.out
    assert "--forward finishes the merge" in found.out
    for direction, said in (("--back", "would put every"), ("--forward", "would change")):
        dry = invoke("recover", base, direction, "--dry-run")
        assert (dry.code, said in dry.out) == (0, True)
    assert bytes_of(base) == kept
    document = json.loads(invoke("recover", base, "--json").out)
    assert (document["found"], document["blocks_changed"]) == (True, 3)
    assert invoke("recover", base, "--back").code == 0
    assert bytes_of(base) == before


def test_forward_needs_the_same_adapter(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(base)
    interrupted(base, adapter, 3, monkeypatch)
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 6', '"lora_alpha": 7'))
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 100)
    with pytest.raises(DisagreementError, match="are not what they were"):
        lt.recover(base, "forward")
    lt.recover(base, "back")
    assert bytes_of(base) == before


def test_forward_remembers_what_was_said_of_ties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = llama_like()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    base = save_folder(state, tmp_path / "base", LLAMA | {"tie_word_embeddings": True})
    adapter = save_peft(tmp_path / "adapter", {"lm_head": factors(50, 24)}, lora_alpha=6)
    lt.merge(base, adapter, tmp_path / "whole", ties="both")
    interrupted(base, adapter, 3, monkeypatch, ties="both")
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 100)
    lt.recover(base, "forward")
    assert bytes_of(base) == bytes_of(tmp_path / "whole")


def test_an_unknown_journal_is_left_alone(base: Path) -> None:
    Journal.begin(base, ["model-00001-of-00003.safetensors"], {"command": "x"}, 1).release()
    with pytest.raises(MalformedFile, match="not one that this loratool wrote"):
        lt.recover(base)


def test_a_full_disk_or_a_broken_one_puts_everything_back(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th flush fails with the error of a full disk, or the n-th reading with that of a
    broken one, whichever n: an error, and the base as it was."""
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 300)
    before, failures = bytes_of(base), 0
    for name, number in (("fsync", 28), ("pread", 5)):
        call = getattr(os, name)
        for fails_at in range(1, 60, 3):
            calls = [0]

            def failing(
                *words: Any,
                calls: list[int] = calls,
                call: Any = call,
                fails_at: int = fails_at,
                number: int = number,
            ) -> Any:
                calls[0] += 1
                if calls[0] == fails_at:
                    raise OSError(number, os.strerror(number))
                return call(*words)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    lt.merge_in_place(base, adapter, jobs=1)
                except (OSError, OutputError):
                    failures += 1
                    assert bytes_of(base) == before
                    continue
            lt.merge_in_place(base, [(adapter, 1.0)])
            break
        for path, data in before.items():
            (base / path).write_bytes(data)
    assert failures > 12


def test_the_command_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    dry = invoke("merge", base, adapter, "--in-place", "--dry-run")
    assert dry.code == 0
    assert "disk, until it has finished: " in dry.out
    plan = json.loads(invoke("merge", base, adapter, "--in-place", "--dry-run", "--json").out)
    assert plan["disk_at_least"] < plan["disk_at_most"]
    assert plan["in_place"] is True
    clash = invoke("merge", base, adapter, "--in-place", "--dtype", "float32", "-o", tmp_path / "x")
    assert clash.code == 2
    assert "--in-place does not go with -o, --dtype" in clash.err
    assert invoke("merge", base, adapter).code == 2
    lt.merge(base, adapter, tmp_path / "merged")
    done = invoke("merge", base, adapter, "--in-place")
    assert done.code == 0
    assert f"merged into {base}: 2 of" in done.out
    assert bytes_of(base) == bytes_of(tmp_path / "merged")


def test_an_update_that_needs_the_whole_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA on a weight stored (in, out): its norms run over rows that are changed one by one."""
    monkeypatch.setattr(merge_in_place, "BLOCK_BYTES", 100)
    monkeypatch.setattr("loratool.ops.merge_jobs.BLOCK_ELEMENTS", 64)
    base = save_folder(gpt2_like(torch.bfloat16), tmp_path / "base", GPT2)
    a, b = factors(48, 16)
    name = "base_model.model.h.0.attn.c_attn"
    tensors = {
        f"{name}.lora_A.weight": a,
        f"{name}.lora_B.weight": b,
        f"{name}.lora_magnitude_vector": torch.linspace(0.5, 1.5, 48),
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": True}
    config |= {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    lt.merge(base, adapter, tmp_path / "merged")
    lt.merge_in_place(base, adapter)
    assert bytes_of(base) == bytes_of(tmp_path / "merged")
