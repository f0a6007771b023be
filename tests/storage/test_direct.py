"""Writes past the page cache: the same bytes as through it, wherever the range begins and ends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.errors import NoSpace, OutputError
from loratool.storage import direct
from loratool.storage.direct import ALIGNMENT, write_direct
from loratool.storage.writing import copy_range, create_with_header, write_at

BACKGROUND = 0xEE


@pytest.fixture(autouse=True)
def small_ranges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LEAST_BYTES", ALIGNMENT)
    monkeypatch.setattr(direct, "_CHUNK_BYTES", 2 * ALIGNMENT)
    direct._MEMORY._buffer = None


def prepared(path: Path, size: int) -> Path:
    path.write_bytes(bytes([BACKGROUND]) * size)
    return path


@settings(deadline=None, max_examples=40)
@given(
    offset=st.integers(0, 3 * ALIGNMENT), length=st.integers(0, 7 * ALIGNMENT), copied=st.booleans()
)
def test_exactly_the_range_is_written(
    tmp_path_factory: pytest.TempPathFactory, offset: int, length: int, copied: bool
) -> None:
    folder = tmp_path_factory.mktemp("direct")
    data = os.urandom(length)
    target = prepared(folder / "target", 12 * ALIGNMENT)
    if copied:
        source = folder / "source"
        source.write_bytes(b"ahead" + data + b"behind")
        copy_range(source, 5, target, offset, length)
    else:
        write_at(target, offset, memoryview(data))
    expected = bytearray([BACKGROUND]) * (12 * ALIGNMENT)
    expected[offset : offset + length] = data
    assert target.read_bytes() == bytes(expected)


def test_the_aligned_middle_does_not_go_through_the_cache(tmp_path: Path) -> None:
    target = prepared(tmp_path / "target", 8 * ALIGNMENT)
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no direct writes on this system")

    def fill(buffer: memoryview, position: int) -> int:
        buffer[:] = bytes([7]) * len(buffer)
        return len(buffer)

    written = write_direct(target, 100, 4 * ALIGNMENT, fill)
    if not written:
        pytest.skip("no direct writes on this file system")
    assert (written.start, written.stop) == (ALIGNMENT - 100, 4 * ALIGNMENT - 100)
    assert target.read_bytes()[ALIGNMENT : 4 * ALIGNMENT] == bytes([7]) * (3 * ALIGNMENT)
    assert target.read_bytes()[:ALIGNMENT] == bytes([BACKGROUND]) * ALIGNMENT


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_refusal_halfway_leaves_the_rest_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    target, data = prepared(tmp_path / "target", 8 * ALIGNMENT), os.urandom(8 * ALIGNMENT)
    refuse_second_call(monkeypatch, refusal)
    write_at(target, 0, memoryview(data))
    assert target.read_bytes() == data


@pytest.mark.parametrize(("failure", "error"), [(errno.ENOSPC, NoSpace), (errno.EIO, OutputError)])
def test_a_full_or_broken_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int, error: type[Exception]
) -> None:
    target = prepared(tmp_path / "target", 8 * ALIGNMENT)
    refuse_second_call(monkeypatch, failure)
    with pytest.raises(error):
        write_at(target, 0, memoryview(os.urandom(8 * ALIGNMENT)))


def refuse_second_call(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The second write of the process fails as an operating system would have it."""
    real, calls = os.pwrite, iter(range(1000))

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if next(calls) == 1:
            raise OSError(code, os.strerror(code))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.skipif(sys.platform != "linux", reason="fallocate is Linux's")
def test_a_new_file_has_its_blocks_and_reads_as_zeros(tmp_path: Path) -> None:
    create_with_header(tmp_path / "new", b"header", 10 * ALIGNMENT)
    stat = (tmp_path / "new").stat()
    if not stat.st_blocks:
        pytest.skip("this file system cannot reserve")
    assert stat.st_blocks * 512 >= stat.st_size == 10 * ALIGNMENT
    assert (tmp_path / "new").read_bytes() == b"header" + bytes(10 * ALIGNMENT - 6)
