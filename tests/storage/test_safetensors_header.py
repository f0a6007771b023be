"""The header parser and writer against the safetensors library, and files that lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratool.errors import MalformedFile, UnsupportedInput
from loratool.storage.dtypes import BY_NAME, BY_TORCH
from loratool.storage.safetensors_file import aligned_order, encode_header, read_header
from loratool.storage.tensors import MemoryTensor
from loratool.storage.writing import write_tensors
from tests.builders import entry, write_raw_safetensors

NAMES = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
DTYPES = st.sampled_from([dtype for dtype in BY_TORCH if dtype is not None])
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit pattern, NaN and −0 included, of any dtype."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if dtype is torch.bool:
        raw = draw(st.lists(st.integers(0, 1), min_size=nbytes, max_size=nbytes))
    else:
        raw = list(draw(st.binary(min_size=nbytes, max_size=nbytes)))
    return torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)


CHECKPOINTS = st.dictionaries(NAMES, tensors(), max_size=5)
METADATA = st.dictionaries(
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=8),
    max_size=3,
)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "model.safetensors"


@settings(max_examples=60, deadline=None)
@given(CHECKPOINTS, METADATA)
def test_what_the_library_wrote_is_read_alike(
    file: Path, state: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    safetensors.torch.save_file(state, file, metadata or None)
    header = read_header(file)
    assert header.metadata == metadata
    assert header.file_size == file.stat().st_size
    assert set(header.tensors) == set(state)
    for name, tensor in state.items():
        info = header.tensors[name]
        assert info.dtype.torch is tensor.dtype
        assert info.shape == tuple(tensor.shape)
        value = info.read()
        assert value.dtype is tensor.dtype
        assert value.shape == tensor.shape
        assert bits(value) == bits(tensor)


@settings(max_examples=60, deadline=None)
@given(CHECKPOINTS, METADATA)
def test_what_we_wrote_the_library_reads_alike(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_tensors(path, {name: MemoryTensor(value) for name, value in state.items()}, metadata)
    with safetensors.safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata
        assert set(opened.keys()) == set(state)
    loaded = safetensors.torch.load_file(path)
    for name, tensor in state.items():
        assert loaded[name].dtype is tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=5))
def test_in_the_librarys_order_our_bytes_are_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]
) -> None:
    """Same padding, same separators, same escapes: nothing about a file tells who wrote it.

    The library sorts by dtype (its own enumeration, descending) and then by name; its order is
    taken from its file, since ours sorts by width only.
    """
    theirs = safetensors.torch.save(state)
    (length,) = struct.unpack("<Q", theirs[:8])
    order = [name for name in json.loads(theirs[8 : 8 + length]) if name != "__metadata__"]
    path = tmp_path_factory.mktemp("bytes") / "model.safetensors"
    write_tensors(path, {name: MemoryTensor(state[name]) for name in order}, {})
    assert path.read_bytes() == theirs


def test_golden_bytes() -> None:
    """The format's own example, spelt out, so that a change of layout is seen for what it is."""
    header, offsets = encode_header({"a": (BY_NAME["F16"], (2, 1))}, {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]}}'
    )
    text += b" " * (-len(text) % 8)
    assert header == len(text).to_bytes(8, "little") + text
    assert offsets == {"a": len(header)}


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(list(BY_NAME.values())), SHAPES)))
@settings(max_examples=40, deadline=None)
def test_aligned_order_aligns_every_tensor(described: dict[str, Any]) -> None:
    described = {n: (d, s) for n, (d, s) in described.items() if d.bits >= 8}
    ordered = {name: described[name] for name in aligned_order(described)}
    _, offsets = encode_header(ordered, {})
    for name, (dtype, _) in ordered.items():
        assert offsets[name] % (dtype.bits // 8) == 0


def test_rows_are_slices(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {
        "matrix": torch.arange(35, dtype=torch.bfloat16).reshape(7, 5),
        "vector": torch.arange(6, dtype=torch.int16),
        "scalar": torch.tensor(3.5),
        "flat": torch.zeros(4, 0),
    }
    safetensors.torch.save_file(state, path)
    infos = read_header(path).tensors
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        assert torch.equal(infos["matrix"].read_rows(start, stop), state["matrix"][start:stop])
    assert torch.equal(infos["vector"].read_rows(1, 4), state["vector"][1:4])
    assert torch.equal(infos["scalar"].read_rows(0, 1), state["scalar"])
    assert infos["flat"].read_rows(1, 3).shape == (2, 0)


def test_types_that_torch_lacks_are_described_and_not_read(tmp_path: Path) -> None:
    header = {"w": entry("F4", [4], 0, 2)}
    info = read_header(write_raw_safetensors(tmp_path / "m.safetensors", header, b"ab")).tensors[
        "w"
    ]
    assert (info.dtype.name, info.shape, info.nbytes) == ("F4", (4,), 2)
    with pytest.raises(UnsupportedInput, match="w is F4"):
        info.read()


HUGE = 2**62
DEEP = '{"a":' * 100_000

ATTACKS: dict[str, tuple[dict[str, Any] | str | bytes, bytes, str]] = {
    "not JSON": ('{"w": ', b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "nested deeply": (DEEP, b"", "not valid JSON"),
    "endless digits": ('{"w": {"shape": [' + "9" * 10_000 + "]}}", b"", "not valid JSON"),
    "an array": ("[]", b"", "not a JSON object"),
    "null": ("null", b"", "not a JSON object"),
    "a name twice": (
        '{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        ' "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"a",
        "names 'w' twice",
    ),
    "a field twice": (
        '{"w": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}',
        b"a",
        "names 'dtype' twice",
    ),
    "an empty name": ({"": entry("U8", [1], 0, 1)}, b"a", "unusable name ''"),
    "a terminal escape in a name": (
        {"\x1b[31mred": entry("U8", [1], 0, 1)},
        b"a",
        r"unusable name '\\x1b\[31mred'",
    ),
    "NUL in a name": ({"a\0b": entry("U8", [1], 0, 1)}, b"a", "unusable name"),
    "an 8-bit control in a name": ({"a\x9bb": entry("U8", [1], 0, 1)}, b"a", "unusable name"),
    "half a surrogate pair in a name": (
        '{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b"a",
        "unusable name",
    ),
    "an entry that is a list": ({"w": [1, 2]}, b"", "not described by an object"),
    "no dtype": ({"w": {"shape": [1], "data_offsets": [0, 1]}}, b"a", "unknown dtype None"),
    "an unknown dtype": ({"w": entry("F99", [1], 0, 1)}, b"a", "unknown dtype 'F99'"),
    "a dtype that is a list": ({"w": entry([], [1], 0, 1)}, b"a", "unknown dtype"),
    "a negative size": ({"w": entry("U8", [-1], 0, 1)}, b"a", "impossible shape"),
    "a huge size": ({"w": entry("U8", [2**64], 0, 1)}, b"a", "impossible shape"),
    "a fractional size": ({"w": entry("U8", [1.0], 0, 1)}, b"a", "impossible shape"),
    "a boolean size": ({"w": entry("U8", [True], 0, 1)}, b"a", "impossible shape"),
    "a shape that is a number": ({"w": entry("U8", 1, 0, 1)}, b"a", "impossible shape"),
    "a product that overflows 64 bits": (
        {"w": entry("U8", [HUGE, HUGE], 0, 0)},
        b"",
        "tensor 'w'",
    ),
    "a product beyond every float": ({"w": entry("U8", [HUGE] * 20, 0, 0)}, b"", "tensor 'w'"),
    "an overflow hidden by a zero": (
        {"w": entry("U8", [HUGE, HUGE, 0], 0, 0)},
        b"",
        "tensor 'w'",
    ),
    "a million dimensions": ({"w": entry("U8", [HUGE] * 300_000, 0, 0)}, b"", "tensor 'w'"),
    "one offset": (
        {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0]}},
        b"a",
        "impossible offsets",
    ),
    "offsets that run backwards": ({"w": entry("U8", [1], 1, 0)}, b"a", "impossible offsets"),
    "a negative offset": ({"w": entry("U8", [2], -1, 1)}, b"a", "impossible offsets"),
    "a fractional offset": ({"w": entry("U8", [1], 0.0, 1.0)}, b"a", "impossible offsets"),
    "more bytes than the shape": ({"w": entry("F32", [1], 0, 5)}, b"abcde", "takes 4"),
    "fewer bytes than the shape": ({"w": entry("F32", [1], 0, 3)}, b"abc", "takes 4"),
    "half a byte": ({"w": entry("F4", [3], 0, 1)}, b"a", "tensor 'w'"),
    "an overlap": (
        {"v": entry("U8", [2], 0, 2), "w": entry("U8", [2], 1, 3)},
        b"abc",
        "'w' overlaps",
    ),
    "two names for the same bytes": (
        {"v": entry("U8", [2], 0, 2), "w": entry("U8", [2], 0, 2)},
        b"ab",
        "overlaps",
    ),
    "a hole": (
        {"v": entry("U8", [1], 0, 1), "w": entry("U8", [1], 2, 3)},
        b"abc",
        "'w' leaves a hole",
    ),
    "a hole at the start": ({"w": entry("U8", [1], 1, 2)}, b"ab", "'w' leaves a hole"),
    "trailing bytes": ({"w": entry("U8", [1], 0, 1)}, b"ab", "holds 1 bytes"),
    "truncated data": ({"w": entry("U8", [4], 0, 4)}, b"abc", "is truncated"),
    "metadata that is a list": ({"__metadata__": [1]}, b"", "__metadata__"),
    "metadata with a number": ({"__metadata__": {"format": 1}}, b"", "__metadata__"),
    "metadata that is null": ({"__metadata__": None}, b"", "__metadata__"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_file_that_lies_is_refused_by_name(tmp_path: Path, attack: str) -> None:
    header, data, message = ATTACKS[attack]
    path = write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(MalformedFile, match=message) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert len(caught.value.message) < len(str(path)) + 500
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long"),
        (b"1234567", "is 7 bytes long"),
        (struct.pack("<Q", 100) + b"{}", "claims a header of 100 bytes in a file of 10"),
        (struct.pack("<Q", 100_000_001) + b"{}", "the format allows 100,000,000"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "the format allows 100,000,000"),
        (struct.pack("<Q", 0), "not valid JSON"),
    ],
)
def test_a_prefix_that_lies(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(MalformedFile, match=message):
        read_header(path)


def test_what_the_format_allows_is_not_refused(tmp_path: Path) -> None:
    """Extra keys, padding, no tensors, empty tensors, unsorted entries."""
    header = {
        "late": entry("U8", [2], 1, 3),
        "early": entry("U8", [1], 0, 1) | {"extra": "ignored"},
        "empty": entry("F32", [0, 5], 3, 3),
    }
    text = json.dumps(header) + "   "
    infos = read_header(write_raw_safetensors(tmp_path / "a.safetensors", text, b"abc")).tensors
    assert infos["late"].read().tolist() == list(b"bc")
    assert infos["empty"].read().shape == (0, 5)
    assert read_header(write_raw_safetensors(tmp_path / "b.safetensors", "{}")).tensors == {}


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(64)}, path)
    info = read_header(path).tensors["w"]
    with open(path, "r+b") as opened:
        opened.truncate(path.stat().st_size - 8)
    with pytest.raises(MalformedFile, match="ends in the middle of w"):
        info.read()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_never_crash_the_parser(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever happens to a file, it is read as what it says or refused with our own error."""
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}
    content = bytearray(safetensors.torch.save(state, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(bytes(content))
    try:
        header = read_header(path)
    except MalformedFile:
        return
    assert header.file_size == len(content)
    for info in header.tensors.values():
        assert info.read().numel() == info.numel if info.dtype.torch else True
