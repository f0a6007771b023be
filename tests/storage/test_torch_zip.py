"""Torch pickles against torch.load, and pickles that attack."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loratool.errors import LoratoolError, MalformedFile, UnsupportedInput
from loratool.storage import dtypes
from loratool.storage.torch_zip import read_torch_zip

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def same_as_torch_load(path: Path, choose: Callable[[Any], Any] = lambda state: state) -> None:
    """Names, dtypes, shapes and bits, read whole and by rows, are torch's own."""
    expected = choose(torch.load(path, weights_only=True))
    expected = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    infos = read_torch_zip(path)
    assert list(infos) == list(expected)
    for name, value in expected.items():
        value = value.detach()
        info, read = infos[name], infos[name].read()
        assert info.dtype.torch is value.dtype
        assert info.shape == tuple(value.shape)
        assert read.is_contiguous()
        assert read.dtype is value.dtype
        assert torch.equal(as_bits(read), as_bits(value.contiguous()))
        if value.ndim and len(value) > 1:
            rows = info.read_rows(1, len(value))
            assert torch.equal(as_bits(rows), as_bits(value[1:].contiguous()))


def as_bits(value: Tensor) -> Tensor:
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (torch.arange(24).reshape(4, 6) % 2).to(dtype)
    torch.save({"w": value, "scalar": value[1, 1].clone()}, tmp_path / "m.bin")
    same_as_torch_load(tmp_path / "m.bin")


def test_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    state = {
        "whole": base,
        "again": base,
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3:7],
        "strided": base[::2, 1::3],
        "diagonal": base.diagonal(),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "one row of many": base[1:2].T,
        "element": base[3, 3],
        "empty": base[:0],
        "no columns": torch.zeros(3, 0),
        "scalar": torch.tensor(7),
        "row of one column": base[:, :1],
    }
    torch.save(state, tmp_path / "m.pt")
    same_as_torch_load(tmp_path / "m.pt")


def test_modules_parameters_and_metadata(tmp_path: Path) -> None:
    """state_dict() is an OrderedDict with an attribute; parameters have their constructor."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(model.state_dict(), tmp_path / "state.pth")
    same_as_torch_load(tmp_path / "state.pth")
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.pth")
    same_as_torch_load(tmp_path / "parameters.pth")


@pytest.mark.parametrize("keys", [("state_dict",), ("model",), ("model", "module")])
def test_nested_state_dicts(tmp_path: Path, keys: tuple[str, ...]) -> None:
    state: Any = {"w": torch.ones(2, 2), "step": 3, "names": ["a", 1.5, None, True]}
    expected = state
    for key in reversed(keys):
        state = {"epoch": 4, key: state}

    def choose(loaded: Any) -> Any:
        for key in keys:
            loaded = loaded[key]
        return loaded

    torch.save(state, tmp_path / "m.pt")
    same_as_torch_load(tmp_path / "m.pt", choose)
    assert set(read_torch_zip(tmp_path / "m.pt")) == {"w"} == set(expected) - {"step", "names"}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_views(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    value = torch.arange(120).reshape(2, 3, 4, 5)
    value = value.permute(data.draw(st.permutations(range(4))))
    for axis in range(4):
        start = data.draw(st.integers(0, value.shape[axis] - 1))
        step = data.draw(st.integers(1, 3))
        value = value[(slice(None),) * axis + (slice(start, None, step),)]
    path = tmp_path_factory.mktemp("views") / "m.pt"
    torch.save({"w": value}, path)
    same_as_torch_load(path)


# Files that attack ----------------------------------------------------------------------------


def rewrite(
    path: Path,
    change: Callable[[str, bytes], bytes | None],
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write the zip again, each record as ``change`` gives it; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records:
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)
    return path


def saved(path: Path, state: object = None) -> Path:
    torch.save({"w": torch.arange(6.0).reshape(2, 3)} if state is None else state, path)
    return path


def with_pickle(path: Path, text: bytes) -> Path:
    return rewrite(saved(path), lambda name, old: text if name.endswith("data.pkl") else old)


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["value", "beside", "key"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, where: str, protocol: int) -> None:
    witness = tmp_path / "witness"
    attacks = [
        Calls(os.system, f"touch {witness}"),
        Calls(eval, f"open({str(witness)!r}, 'w')"),
        Calls(exec, f"open({str(witness)!r}, 'w')"),
        Calls(getattr, os, "system"),
        Calls(io.open, str(witness), "w"),
        Calls(torch.load, str(witness)),
    ]
    for attack in attacks:
        state: dict[Any, Any] = {"w": 1}
        if where == "value":
            state["w"] = attack
        elif where == "beside":
            state["optimizer"] = [attack]
        else:
            state[(attack,)] = 1
        try:
            text = pickle.dumps(state, protocol)
        except TypeError:
            continue  # a module as an argument cannot be pickled; torch.save could not either
        path = with_pickle(tmp_path / "m.bin", text)
        with pytest.raises(UnsupportedInput, match="its pickle asks for") as caught:
            read_torch_zip(path)
        assert "never executes" in (caught.value.hint or "")
        assert not witness.exists()


def test_the_attack_works_on_an_unguarded_reader(tmp_path: Path) -> None:
    """The test above would be empty if these pickles did nothing anywhere."""
    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps({"w": Calls(os.system, f"touch {witness}")}))
    assert witness.exists()


def op_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def op_string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def op_storage(dtype: str = "FloatStorage", key: str = "0", numel: bytes = b"K\x06") -> bytes:
    return (
        b"("
        + op_string("storage")
        + op_global("torch", dtype)
        + op_string(key)
        + op_string("cpu")
        + numel
        + b"tQ"
    )


def op_tensor(
    offset: bytes = b"K\x00", shape: bytes = b"(K\x02K\x03t", strides: bytes = b"(K\x03K\x01t"
) -> bytes:
    return (
        op_global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + op_storage()
        + offset
        + shape
        + strides
        + b"\x89"
        + op_global("collections", "OrderedDict")
        + b")RtR"
    )


def op_state(value: bytes, after: bytes = b"") -> bytes:
    return b"\x80\x02}" + op_string("w") + value + b"s" + after + b"."


def op_dict(**values: bytes) -> bytes:
    return b"}" + b"".join(op_string(key) + value + b"s" for key, value in values.items())


LONG = b"\x8b" + struct.pack("<I", 4001) + b"\xff" * 4000 + b"\x00"


def test_the_hand_made_pickle_is_a_real_one(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "m.bin", op_state(op_tensor()))
    same_as_torch_load(path)


HOSTILE_PICKLES: dict[str, bytes] = {
    "nothing": b"",
    "cut short": op_state(op_tensor())[:-20],
    "no opcodes": b"\xff\xfe",
    "a tensor that is a number": op_state(
        op_global("torch._utils", "_rebuild_tensor_v2") + b"(K\x01K\x00))tR"
    ),
    "a negative offset": op_state(op_tensor(offset=b"J\xff\xff\xff\xff")),
    "a negative size": op_state(op_tensor(shape=b"(J\xff\xff\xff\xffK\x03t")),
    "a negative stride": op_state(op_tensor(strides=b"(J\xff\xff\xff\xffK\x01t")),
    "a size that is a string": op_state(op_tensor(shape=b"(" + op_string("2") + b"K\x03t")),
    "a size beyond printing": op_state(op_tensor(shape=b"(" + LONG + b"K\x03t")),
    "an offset beyond printing": op_state(op_tensor(offset=LONG)),
    "strides beyond printing": op_state(op_tensor(strides=b"(" + LONG + LONG + b"t")),
    "more strides than sizes": op_state(op_tensor(strides=b"(K\x03K\x01K\x01t")),
    "forty dimensions": op_state(
        op_tensor(shape=b"(" + b"K\x01" * 40 + b"t", strides=b"(" + b"K\x01" * 40 + b"t")
    ),
    "a view rewritten after its checks": op_state(
        op_tensor() + op_dict(shape=b"(" + op_string("x") + b"t") + b"b"
    ),
    "a view given a negative offset after its checks": op_state(
        op_tensor() + op_dict(offset=b"J\xf0\xff\xff\xff") + b"b"
    ),
    "a storage rewritten after its checks": op_state(
        op_global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + op_storage()
        + op_dict(dtype=op_string("x"))
        + b"b"
        + b"K\x00(K\x06t(K\x01t\x89N"
        + b"tR"
    ),
    "a dtype rewritten for everybody": op_state(
        op_tensor(), after=op_global("torch", "FloatStorage") + op_dict(bits=b"K\x08") + b"b0"
    ),
    "a constructor rewritten for everybody": op_state(
        op_tensor(),
        after=op_global("torch._utils", "_rebuild_tensor_v2")
        + b"N"
        + op_dict(__defaults__=b"(K\x01t")
        + b"\x86b0",
    ),
    "a dict whose methods are replaced": (
        b"\x80\x02"
        + op_global("collections", "OrderedDict")
        + b")R"
        + op_string("w")
        + op_tensor()
        + b"s"
        + op_dict(items=op_string("x"))
        + b"b."
    ),
    "a storage of an unknown kind": op_state(b"(" + op_string("storage") + b"K\x01K\x01tQ"),
    "names with terminal escapes": b"\x80\x02}" + op_string("\x1b[31m") + op_tensor() + b"s.",
    "an empty name": b"\x80\x02}" + op_string("") + op_tensor() + b"s.",
    "a number for a name": b"\x80\x02}K\x01" + op_tensor() + b"s.",
    "a dict inside itself": b"\x80\x02}q\x00" + op_string("model") + b"h\x00s.",
    "only a tensor": b"\x80\x02" + op_tensor() + b".",
    "a list": b"\x80\x02].",
}
HARMLESS = {"a dict whose methods are replaced"}


@pytest.mark.parametrize("attack", HOSTILE_PICKLES)
def test_a_hostile_pickle_is_one_error_and_changes_nothing(tmp_path: Path, attack: str) -> None:
    """It may also be read as what it is; it may not crash, nor reach into this process."""
    before = [(dtype.name, dtype.bits, dtype.torch) for dtype in dtypes.BY_NAME.values()]
    path = with_pickle(tmp_path / "m.bin", HOSTILE_PICKLES[attack])
    if attack in HARMLESS:
        assert set(read_torch_zip(path)) == {"w"}
    else:
        with pytest.raises((MalformedFile, UnsupportedInput)) as caught:
            read_torch_zip(path)
        assert str(path) in caught.value.message
        assert len(caught.value.message) < len(str(path)) + 500
    after = [(dtype.name, dtype.bits, dtype.torch) for dtype in dtypes.BY_NAME.values()]
    assert after == before
    same_as_torch_load(saved(tmp_path / "good.bin"))


def test_a_small_file_cannot_unfold_into_a_huge_one(tmp_path: Path) -> None:
    path = rewrite(saved(tmp_path / "m.bin"), lambda _, old: old, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedInput, match="is compressed"):
        read_torch_zip(path)


def test_an_expanded_view_is_not_unfolded(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": torch.ones(1).expand(10**9)})
    assert path.stat().st_size < 10_000
    with pytest.raises(UnsupportedInput, match=r"w is an expanded view of 1 .* 1,000,000,000"):
        read_torch_zip(path)


def test_overlapping_windows_are_not_unfolded(tmp_path: Path) -> None:
    windows = torch.arange(100.0).unfold(0, 50, 1)
    with pytest.raises(UnsupportedInput, match="w is an expanded view"):
        read_torch_zip(saved(tmp_path / "m.bin", {"w": windows}))


def test_a_storage_shorter_than_its_tensor(tmp_path: Path) -> None:
    path = rewrite(
        saved(tmp_path / "m.bin"), lambda name, old: old[:-4] if "/data/" in name else old
    )
    with pytest.raises(MalformedFile, match="w needs 24 bytes of a storage that has 20"):
        read_torch_zip(path)


def test_a_missing_record(tmp_path: Path) -> None:
    path = rewrite(saved(tmp_path / "m.bin"), lambda name, old: None if "/data/" in name else old)
    with pytest.raises(MalformedFile, match=r"the data of w .* is missing"):
        read_torch_zip(path)


def test_a_big_endian_file(tmp_path: Path) -> None:
    path = rewrite(
        saved(tmp_path / "m.bin"), lambda name, old: b"big" if "byteorder" in name else old
    )
    with pytest.raises(UnsupportedInput, match="big-endian"):
        read_torch_zip(path)


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(MalformedFile, match=r"not one that torch.save wrote"):
        read_torch_zip(path)


def test_files_of_old_torch_and_bare_pickles(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedInput, match="not a zip-based torch file"):
        read_torch_zip(path)
    witness = tmp_path / "witness"
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {witness}")))
    with pytest.raises(UnsupportedInput, match="not a zip-based torch file"):
        read_torch_zip(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 100])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises((MalformedFile, UnsupportedInput)):
        read_torch_zip(tmp_path / "m.bin")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_truncated_zip(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path / "m.bin", {"w": torch.ones(100, 100)})
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(MalformedFile, match="damaged or truncated"):
        read_torch_zip(path)


def test_an_encrypted_record(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin")
    content = bytearray(path.read_bytes())
    position = content.find(b"PK\x01\x02")
    while position >= 0:
        content[position + 8] |= 1
        position = content.find(b"PK\x01\x02", position + 1)
    path.write_bytes(bytes(content))
    with pytest.raises((MalformedFile, UnsupportedInput)):
        read_torch_zip(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_never_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = collections.OrderedDict(w=torch.arange(6.0).reshape(2, 3).T, b=torch.ones(2).half())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.bin"
    path.write_bytes(bytes(content))
    try:
        infos = read_torch_zip(path)
    except LoratoolError:
        return
    for info in infos.values():
        assert info.read().numel() == info.numel
