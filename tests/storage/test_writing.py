"""Outputs that appear whole or not at all, and what is never overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratool.errors import InputMissing, NoSpace, OutputError, OutputExists
from loratool.storage.dtypes import BY_NAME
from loratool.storage.outputs import check_free_space, check_output, staged
from loratool.storage.publishing import check_file
from loratool.storage.safetensors_file import read_header
from loratool.storage.tensors import MemoryTensor
from loratool.storage.writing import copy_range, create_safetensors, park, write_tensors
from tests.builders import relative_paths, snapshot, write_checkpoint

LAYOUTS = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "a slice": torch.arange(40.0).reshape(4, 10)[:, 2:5],
    "expanded": torch.ones(1).expand(4, 2),
    "one value of a column": torch.arange(60.0).reshape(6, 10).T[3:4, 2:3],
    "one value, 4-d": torch.arange(120).reshape(2, 3, 4, 5).permute(0, 2, 3, 1)[:1, 3:, 2:3, :1],
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "a parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_memory_layout_is_written_row_major(tmp_path: Path, name: str) -> None:
    value = LAYOUTS[name]
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"w": MemoryTensor(value)}, {})
    assert torch.equal(load_file(path)["w"], value)
    parked = park(tmp_path / "raw", {"other": torch.ones(3), "w": value})
    assert torch.equal(parked["w"].read(), value)


def test_strided_tensors_of_a_pickle_are_written_as_values(tmp_path: Path) -> None:
    from loratool.storage.torch_zip import read_torch_zip

    value = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": value.T, "v": value}, tmp_path / "m.bin")
    write_tensors(tmp_path / "m.safetensors", read_torch_zip(tmp_path / "m.bin"), {})
    loaded = load_file(tmp_path / "m.safetensors")
    assert torch.equal(loaded["w"], value.T)
    assert torch.equal(loaded["v"], value)


def test_slots_fill_a_file_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    shapes = {"a": (BY_NAME["F32"], (4, 3)), "b": (BY_NAME["BF16"], (5,))}
    slots = create_safetensors(path, shapes, {"format": "pt"})
    a, b = torch.randn(4, 3), torch.randn(5).bfloat16()
    slots["b"].write(b)
    slots["a"].write_rows(2, a[2:])
    slots["a"].write_rows(0, a[:2])
    loaded = load_file(path)
    assert torch.equal(loaded["a"], a)
    assert torch.equal(loaded["b"], b)
    with pytest.raises(AssertionError):
        slots["a"].write(a.double())


def test_copy_range_copies_exactly_that_range(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(200)))
    (tmp_path / "target").write_bytes(b"\0" * 100)
    copy_range(tmp_path / "source", 50, tmp_path / "target", 10, 30)
    expected = b"\0" * 10 + bytes(range(50, 80)) + b"\0" * 60
    assert (tmp_path / "target").read_bytes() == expected


def test_a_source_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    (tmp_path / "target").write_bytes(b"\0" * 10)
    with pytest.raises(InputMissing, match="source: shrank"):
        copy_range(tmp_path / "source", 0, tmp_path / "target", 0, 10)


# Staging --------------------------------------------------------------------------------------


def test_nothing_is_visible_before_publish(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output) as staging:
        (staging.out / "a.txt").write_text("a")
        (staging.scratch / "parked").write_text("b")
        assert not output.exists()
        staging.publish(overwrite=False)
        assert snapshot(output) == {"a.txt": snapshot(output)["a.txt"]}
    assert relative_paths(tmp_path) == ["out", "out/a.txt"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "new" / "deep" / "out") as staging:  # noqa: PT012
        (staging.out / "a.txt").write_text("a")
        raise ZeroDivisionError
    assert relative_paths(tmp_path) == []


def test_folders_made_for_an_output_stay_with_it(tmp_path: Path) -> None:
    with staged(tmp_path / "new" / "deep" / "out") as staging:
        (staging.out / "a.txt").write_text("a")
        staging.publish(overwrite=False)
    assert relative_paths(tmp_path) == ["new", "new/deep", "new/deep/out", "new/deep/out/a.txt"]


def test_folders_that_were_there_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "mine" / "out"):
        raise ZeroDivisionError
    assert relative_paths(tmp_path) == ["mine"]


def test_one_file_can_be_the_output(tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    with staged(output) as staging:
        save_file({"w": torch.ones(2)}, staging.out / "model.safetensors")
        staging.publish(overwrite=False, only_file="model.safetensors")
    assert relative_paths(tmp_path) == ["merged.safetensors"]
    assert set(read_header(output).tensors) == {"w"}


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputExists, match="appeared"), staged(output) as staging:  # noqa: PT012
        (staging.out / "a.txt").write_text("ours")
        output.mkdir()
        (output / "a.txt").write_text("theirs")
        staging.publish(overwrite=False)
    assert (output / "a.txt").read_text() == "theirs"
    assert relative_paths(tmp_path) == ["out", "out/a.txt"]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    output = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)})
    (output / "old.txt").write_text("old")
    with staged(output) as staging:
        (staging.out / "new.txt").write_text("new")
        staging.publish(overwrite=True)
    assert relative_paths(tmp_path) == ["out", "out/new.txt"]


def test_overwrite_of_a_link_leaves_its_target(tmp_path: Path) -> None:
    target = write_checkpoint(tmp_path / "target", {"w": torch.ones(2)})
    before = snapshot(target)
    (tmp_path / "out").symlink_to("target")
    with staged(tmp_path / "out") as staging:
        (staging.out / "new.txt").write_text("new")
        staging.publish(overwrite=True)
    assert snapshot(target) == before
    assert not (tmp_path / "out").is_symlink()


def test_modes_are_those_of_ordinary_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "out") as staging:
            write_tensors(staging.out / "m.safetensors", {"w": MemoryTensor(torch.ones(2))}, {})
            staging.publish(overwrite=False)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "m.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_neighbour_still_at_work_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as first:
        with staged(tmp_path / "out"):
            assert first.folder.is_dir()
        (first.out / "a.txt").write_text("a")
        first.publish(overwrite=False)
    assert relative_paths(tmp_path) == ["out", "out/a.txt"]


def test_an_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputError, match="file is no folder"):
        check_output(tmp_path / "file" / "a" / "out", overwrite=False, inputs=[])
    with pytest.raises(OutputError, match="file is no folder"):
        check_file(tmp_path / "file" / "page.html", (b"<html",), overwrite=False)
    assert relative_paths(tmp_path) == ["file"]


# Checks before any work -----------------------------------------------------------------------


def test_an_output_must_not_touch_an_input(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    file = model / "model.safetensors"
    (tmp_path / "link").symlink_to("model")
    cases = [
        (model, model, "is one of the inputs"),
        (tmp_path / "link", model, "is one of the inputs"),
        (model, tmp_path / "link", "is one of the inputs"),
        (model / "merged", model, "lies inside the input"),
        (tmp_path / "link" / "deep" / "merged", model, "lies inside the input"),
        (tmp_path / "model" / ".." / "model" / "x", model, "lies inside the input"),
        (tmp_path, model, "holds the input"),
        (model, file, "holds the input"),
        (file, file, "is one of the inputs"),
    ]
    for output, source, message in cases:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=message):
                check_output(output, overwrite=overwrite, inputs=[tmp_path / "other", source])


def test_beside_an_input_is_fine(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    check_output(tmp_path / "model2", overwrite=False, inputs=[model])
    check_output(model / "b.safetensors", overwrite=False, inputs=[model / "model.safetensors"])


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for output in (model, model / "model.safetensors", tmp_path / "empty", tmp_path / "dangling"):
        with pytest.raises(OutputExists, match="exists already") as caught:
            check_output(output, overwrite=False, inputs=[])
        assert "--overwrite" in (caught.value.hint or "")
        check_output(output, overwrite=True, inputs=[])


def test_overwrite_is_for_models_and_adapters_only(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    (tmp_path / "notes.txt").write_text("more work")
    os.mkfifo(tmp_path / "pipe")
    for output in (folder, tmp_path / "notes.txt", tmp_path / "pipe"):
        with pytest.raises(OutputError, match="will not be replaced"):
            check_output(output, overwrite=True, inputs=[])


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", {"w": torch.ones(2)})
    (tmp_path / "empty").mkdir()
    for folder in (model, tmp_path / "empty"):
        monkeypatch.chdir(folder)
        for output in (Path(), folder, Path("..") / folder.name):
            with pytest.raises(OutputError, match="the folder that you are in"):
                check_output(output, overwrite=True, inputs=[])


def test_an_output_that_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    for far in (tmp_path / ("a" * 256), tmp_path / ("a" * 256) / "b"):
        with pytest.raises(OutputError, match="cannot be written"):
            check_output(far, overwrite=False, inputs=[])
    looping = tmp_path / "one" / "out"
    check_output(looping, overwrite=False, inputs=[tmp_path / "model", tmp_path / "two"])
    with pytest.raises(OutputError, match="cannot be written"), staged(looping):
        pass


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path) -> None:
    check_free_space(tmp_path / "new" / "out", 1)
    with pytest.raises(NoSpace, match="needs 1,000,000,000,000,000,000 bytes, its disk has"):
        check_free_space(tmp_path / "new" / "out", 10**18)
