"""Folders, indexes and shards: as the Hub's cache lays them out, and as an attacker would."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratool.errors import InputMissing, LoratoolError, MalformedFile, UnsupportedInput
from loratool.storage.checkpoint import open_checkpoint, open_weight_file, read_json_file
from tests.builders import write_checkpoint, write_sharded

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
SHARDS = {
    FIRST: {"a.weight": torch.arange(4.0), "b.weight": torch.ones(2, 3)},
    SECOND: {"c.weight": torch.zeros(5, dtype=torch.bfloat16)},
}
WHERE = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}


def test_shards_are_one_mapping(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS)
    for path in (folder, folder / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint) == set(WHERE)
        assert len(checkpoint) == 3
        assert checkpoint.size_bytes == 4 * 4 + 6 * 4 + 5 * 2
        assert not checkpoint.is_single_file
        for shard in SHARDS.values():
            for name, value in shard.items():
                assert torch.equal(checkpoint[name].read(), value)


def test_shards_that_are_links_into_a_cache(tmp_path: Path) -> None:
    """huggingface_hub's snapshots are symbolic links into ../../blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    written = write_sharded(tmp_path / "written", SHARDS)
    for number, path in enumerate(sorted(written.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    checkpoint = open_checkpoint(snapshot)
    assert torch.equal(checkpoint["a.weight"].read(), torch.arange(4.0))
    assert {file.path.name for file in checkpoint.files} == {FIRST, SECOND}


def test_a_file_that_is_a_link_is_known_by_its_links_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "blob")
    link = tmp_path / "model.safetensors"
    link.symlink_to("blob")
    assert torch.equal(open_checkpoint(link)["w"].read(), torch.ones(2))


OUTSIDE = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "..",
    "",
    ".",
    "a\0b",
    "..\\o",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "ABSOLUTE"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a.weight": torch.ones(2)}, outside)
    name = str(outside) if name == "ABSOLUTE" else name
    folder = write_sharded(tmp_path / "model", {}, index={"weight_map": {"a.weight": name}})
    (folder / "sub").mkdir()
    with pytest.raises(MalformedFile, match="outside its own folder") as caught:
        open_checkpoint(folder)
    assert "index.json" in caught.value.message


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS)
    (folder / SECOND).unlink()
    with pytest.raises(InputMissing, match=f"the shard {SECOND} is missing"):
        open_checkpoint(folder)


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS)
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("../gone")
    with pytest.raises(InputMissing, match="is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (WHERE | {"d.weight": SECOND}, "names 1 tensor that its shards do not hold"),
        (WHERE | {"a.weight": SECOND}, "a.weight lies in .*00001.* but the index places it in"),
        ({k: v for k, v in WHERE.items() if k != "b.weight"}, "b.weight lies in .* nowhere"),
    ],
)
def test_an_index_that_disagrees_with_its_shards(
    tmp_path: Path, weight_map: dict[str, str], message: str
) -> None:
    folder = write_sharded(tmp_path / "model", SHARDS, index={"weight_map": weight_map})
    with pytest.raises(MalformedFile, match=message):
        open_checkpoint(folder)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    shards = {FIRST: SHARDS[FIRST], SECOND: {"a.weight": torch.ones(4)}}
    index = {"weight_map": {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}}
    folder = write_sharded(tmp_path / "model", shards, index=index)
    with pytest.raises(MalformedFile, match=f"a.weight lies in {SECOND}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}]
)
def test_an_index_without_a_usable_map(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = write_sharded(tmp_path / "model", {}, index=index)
    with pytest.raises(MalformedFile, match="has no weight_map"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"a":' * 100_000, "9" * 10_000])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(MalformedFile, match="JSON"):
        read_json_file(path)


def test_json_of_monstrous_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(MalformedFile, match="bytes long"):
        read_json_file(path)


def test_folders_are_searched_in_a_known_order(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    torch.save({"w": torch.zeros(2)}, folder / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(folder)["w"].read(), torch.ones(2))
    (folder / "model.safetensors").unlink()
    assert torch.equal(open_checkpoint(folder)["w"].read(), torch.zeros(2))


def test_an_unusual_name_is_found_when_it_is_the_only_one(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path).files[0].path.name == "weights.safetensors"
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputMissing, match="holds 2 weight files") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.details == ("other.safetensors", "weights.safetensors")


def test_nothing_to_open(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissing, match="holds no weights"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(InputMissing, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputMissing, match="is no regular file"):
        open_weight_file(tmp_path / "empty")
    with pytest.raises(InputMissing, match="no such file"):
        open_weight_file(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.gguf", "model.h5", "notes.txt", "model"])
def test_files_of_other_kinds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(UnsupportedInput, match="not a weight file"):
        open_checkpoint(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(LoratoolError):
        open_checkpoint(tmp_path / "model.safetensors")


def test_an_index_of_pickles(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.arange(3)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(open_checkpoint(tmp_path)["a.weight"].read(), torch.arange(3))
