"""The catalogue: what is found, what each is, which are alike, and that nothing stops it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import loratool as lt
from loratool.errors import InputMissing, UsageError
from loratool.ops.catalogue import ORDERS, CatalogueReport
from loratool.ops.catalogue_entry import Entry
from tests.ops.builders import LLAMA, llama_like, moved, save_folder, save_peft


def small_adapter(folder: Path, seed: int = 0, rank: int = 4, **config: object) -> Path:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"model.layers.{layer}.self_attn.{part}": (
            torch.randn(rank, 24, generator=generator),
            torch.randn(rows, rank, generator=generator),
        )
        for layer in range(2)
        for part, rows in (("q_proj", 24), ("k_proj", 12))
    }
    return save_peft(folder, pairs, **config)


def by_name(report: CatalogueReport) -> dict[str, Entry]:
    return {entry.name: entry for entry in report.entries}


def alike(report: CatalogueReport) -> set[tuple[str, frozenset[str]]]:
    return {
        (group.likeness, frozenset(report.entries[index].name for index in group.members))
        for group in report.groups
    }


def test_adapters_and_checkpoints_are_described(tmp_path: Path) -> None:
    state = llama_like(torch.bfloat16)
    save_folder(state, tmp_path / "one", LLAMA)
    save_folder(state, tmp_path / "deep" / "sharded", LLAMA, shards=3)
    small_adapter(tmp_path / "a", lora_alpha=8, base_model_name_or_path="org/base")
    torch.save(
        {"h.0.lora_A": torch.ones(4, 16), "h.0.lora_B": torch.ones(16, 4), "head": torch.ones(3)},
        tmp_path / "loralib.pt",
    )
    report = lt.list_models(tmp_path)
    found = by_name(report)
    assert set(found) == {"one", "deep/sharded", "a", "loralib.pt"}
    assert all(entry.health == "ok" and entry.error is None for entry in found.values())
    parameters = sum(value.numel() for value in state.values())
    for name, files in (("one", 1), ("deep/sharded", 3)):
        entry = found[name]
        assert (entry.kind, entry.parameters, len(entry.files)) == ("checkpoint", parameters, files)
        assert entry.size_bytes == sum(p.stat().st_size for p in entry.files)
        assert (entry.architecture, entry.dtypes) == ("LlamaForCausalLM", ("BF16",))
    adapter = found["a"]
    assert (adapter.kind, adapter.format, adapter.base) == ("adapter", "PEFT", "org/base")
    assert (adapter.ranks, adapter.alphas, adapter.scales) == ((4,), (8.0,), (2.0,))
    assert adapter.targets == ("k_proj", "q_proj")
    assert adapter.parameters == 2 * 4 * (24 + 24 + 24 + 12)
    loralib = found["loralib.pt"]
    assert (loralib.format, loralib.ranks, loralib.whole) == ("loralib", (4,), 1)
    assert loralib.alphas == (), "the file does not store it"


def test_checkpoints_of_other_kinds_and_unread_formats(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "kohya.safetensors")
    save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "diffusers.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    ia3 = small_adapter(tmp_path / "ia3")
    config = json.loads((ia3 / "adapter_config.json").read_text())
    (ia3 / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    (tmp_path / "tokens.bin").write_bytes(b"\1\2\3\4 just tokens")
    report = lt.list_models(tmp_path)
    assert {entry.name: (entry.kind, entry.format, entry.health) for entry in report.entries} == {
        "kohya.safetensors": ("adapter", "kohya", "unread"),
        "diffusers.safetensors": ("adapter", "diffusers", "unread"),
        "model.gguf": ("checkpoint", "GGUF", "unread"),
        "ia3": ("adapter", "PEFT IA3", "unread"),
    }
    assert by_name(report)["kohya.safetensors"].evidence == "lora_unet_x.lora_down.weight"
    assert report.notes[0].endswith("without torch weights: 1"), "what was passed over is counted"


def test_what_ails_is_a_word_and_never_the_end(tmp_path: Path) -> None:
    good = small_adapter(tmp_path / "good", lora_alpha=8)
    weights = (good / "adapter_model.safetensors").read_bytes()

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    (broken("truncated") / "adapter_model.safetensors").write_bytes(weights[:-3])
    (broken("damaged") / "adapter_model.safetensors").write_bytes(b"\xff" * 50)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (broken("pointer") / "adapter_model.safetensors").write_bytes(pointer)
    (broken("no-config") / "adapter_config.json").unlink()
    (broken("missing") / "adapter_model.safetensors").unlink()
    config = json.loads((good / "adapter_config.json").read_text())
    (broken("mismatch") / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    (broken("damaged 2") / "adapter_config.json").write_text("{")
    sharded = save_folder(llama_like(), tmp_path / "missing 2", LLAMA, shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    unindexed = save_folder(llama_like(), tmp_path / "missing 3", LLAMA, shards=2)
    (unindexed / "model.safetensors.index.json").unlink()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    found = by_name(lt.list_models(tmp_path))
    for name, entry in found.items():
        word = "ok" if name == "good" else name.split("/")[0].split(" ")[0]
        assert entry.health == word, (name, entry)
        assert (entry.error is None) == (word == "ok")
    assert len(found) == 10
    assert found["mismatch"].parameters == found["good"].parameters, "what headers say is kept"
    assert found["missing 2"].architecture == "LlamaForCausalLM"
    assert found["missing 2"].size_bytes > 0
    assert "missing 3/model-*-of-00002.safetensors" in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_noted(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)
    report = lt.list_models(tmp_path)
    assert "closed" in report.notes[0]


def test_links_in_circles_are_followed_once(tmp_path: Path) -> None:
    small_adapter(tmp_path / "a" / "deep")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "side").symlink_to(tmp_path / "a")
    (tmp_path / ".hidden").mkdir()
    small_adapter(tmp_path / ".hidden" / "b")
    assert [entry.name for entry in lt.list_models(tmp_path).entries] == ["a/deep"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "link").symlink_to(tmp_path / "a")
    assert [entry.name for entry in lt.list_models(outside).entries] == ["link/deep"]
    twice = lt.list_models(tmp_path / "a", tmp_path)
    assert len(twice.entries) == 1, "folders named twice are listed once"


def test_duplicates(tmp_path: Path) -> None:
    first = small_adapter(tmp_path / "first", lora_alpha=8)
    shutil.copytree(first, tmp_path / "copy")
    small_adapter(tmp_path / "retrained", seed=1, lora_alpha=8)
    small_adapter(tmp_path / "stronger", lora_alpha=16)
    small_adapter(tmp_path / "other rank", rank=2)
    maybe = frozenset({"first", "copy", "retrained"})
    near = ("near", maybe | {"stronger"})
    assert alike(lt.list_models(tmp_path)) == {("candidate", maybe), near}
    sure = lt.list_models(tmp_path, checksum=True)
    assert alike(sure) == {("same", frozenset({"first", "copy"})), near}
    hashed = {entry.name for entry in sure.entries if entry.content}
    assert hashed == set(maybe), "only candidates are read"


def test_equal_factors_with_alphas_exchanged_are_another_update(tmp_path: Path) -> None:
    small_adapter(tmp_path / "one", lora_alpha=8, alpha_pattern={"q_proj": 16})
    small_adapter(tmp_path / "other", lora_alpha=8, alpha_pattern={"k_proj": 16})
    one, other = lt.list_models(tmp_path).entries
    assert (one.alphas, one.scales) == (other.alphas, other.scales)
    for checksum in (False, True):
        found = alike(lt.list_models(tmp_path, checksum=checksum))
        assert found == {("near", frozenset({"one", "other"}))}


def test_one_file_under_two_names_is_a_duplicate_without_reading(tmp_path: Path) -> None:
    first = small_adapter(tmp_path / "first")
    (tmp_path / "linked").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "linked" / name).symlink_to(first / name)
    report = lt.list_models(tmp_path)
    assert alike(report) == {("same", frozenset({"first", "linked"}))}
    assert all(entry.content is None for entry in report.entries)


def test_another_dtype_is_a_near_duplicate(tmp_path: Path) -> None:
    state = llama_like()
    save_folder(state, tmp_path / "a", LLAMA)
    save_folder({k: v.half() for k, v in state.items()}, tmp_path / "b", LLAMA)
    save_folder(moved(llama_like(layers=1)), tmp_path / "c", LLAMA)
    assert alike(lt.list_models(tmp_path)) == {("near", frozenset({"a", "b"}))}


def test_filters_and_orders(tmp_path: Path) -> None:
    small_adapter(tmp_path / "x" / "small", rank=2)
    small_adapter(tmp_path / "x" / "big", rank=8)
    save_folder(llama_like(), tmp_path / "base", LLAMA)

    def names(**options: object) -> list[str]:
        return [entry.name for entry in lt.list_models(tmp_path, **options).entries]  # type: ignore[arg-type]

    assert names() == ["base", "x/big", "x/small"]
    assert names(kind="adapter", sort="rank") == ["x/big", "x/small"]
    assert names(sort="size") == ["base", "x/big", "x/small"]
    assert names(only=["x"]) == ["x/big", "x/small"]
    assert names(only=["b*"]) == ["base", "x/big"]
    for order in ORDERS:
        assert sorted(names(sort=order)) == names()
    with pytest.raises(UsageError, match="cannot sort by"):
        names(sort="colour")
    with pytest.raises(UsageError, match="unknown kind"):
        names(kind="mineral")
    with pytest.raises(InputMissing, match="no such file or folder"):
        lt.list_models(tmp_path / "nowhere")


def test_files_can_be_named(tmp_path: Path) -> None:
    base = save_folder(llama_like(), tmp_path / "base", LLAMA)
    (entry,) = lt.list_models(base / "model.safetensors").entries
    assert entry.health == "ok"
    (entry,) = lt.list_models(base).entries
    assert entry.name == "base"


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    weights=st.binary(max_size=60)
    | st.binary(max_size=40).map(lambda text: struct.pack("<Q", len(text)) + text),
    config=st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from(["peft_type", "r", "lora_alpha", "base_model_name_or_path", "weight_map"]),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
    ).map(lambda value: json.dumps(value).encode()),
    names=st.sampled_from(
        [
            ("adapter_model.safetensors", "adapter_config.json"),
            ("adapter_model.bin", "adapter_config.json"),
            ("model.safetensors", "config.json"),
            ("pytorch_model.bin", "config.json"),
            ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
            ("x.pt", "adapter_config.json"),
        ]
    ),
)
def test_no_bytes_stop_it(
    tmp_path: Path, weights: bytes, config: bytes, names: tuple[str, str]
) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / names[0]).write_bytes(weights)
    (folder / names[1]).write_bytes(config)
    for entry in lt.list_models(folder).entries:
        json.dumps(entry.to_json(), allow_nan=False)


def test_no_tensor_bytes_are_read(tmp_path: Path) -> None:
    """Files whose data are a hole of a terabyte are listed like any other."""
    entry = {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}
    text = json.dumps({"w": entry}).encode()
    for index in range(3):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + 2**40)
    report = lt.list_models(tmp_path)
    assert [found.parameters for found in report.entries] == [2**38] * 3
    assert alike(report) == {("candidate", frozenset(f"{i}.safetensors" for i in range(3)))}
