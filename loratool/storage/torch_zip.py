"""Torch's zip container (``.bin``, ``.pt``, ``.pth``), read without executing anything.

A plan needs names, shapes and byte ranges before it touches data, so the pickle inside is read by
a restricted unpickler that knows exactly the handful of constructors a state dict is made of and
builds descriptions instead of tensors. Every other name in the pickle is refused. Storages are
stored uncompressed by ``torch.save``; compressed ones are refused, since they would let a small
file unfold into a huge one.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from loratool.errors import MalformedFile, UnsupportedInput
from loratool.storage.dtypes import BY_NAME, BY_TORCH, DType
from loratool.storage.tensors import TensorInfo

MAX_PICKLE_BYTES = 64 * 2**20
MAX_ENTRIES = 1_000_000
MAX_NESTING = 4
_MAX_DIMENSIONS = 16
_MAX_QUOTE = 200
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error)
"""What zipfile raises for damaged archives, by experiment."""

_STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
_TORCH_DTYPES = {str(kind).removeprefix("torch."): dtype for kind, dtype in BY_TORCH.items()}


class _Sealed:
    """What a pickle gets hold of: it can be passed about, its state cannot be set."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("a record is rewritten")


class _StateDict(dict[Any, Any]):
    """Stands for OrderedDict; the attributes that modules hang on it are dropped."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class _ElementType(_Sealed):
    dtype: DType


@dataclass(frozen=True)
class _Storage(_Sealed):
    key: str
    dtype: DType


@dataclass(frozen=True)
class _View(_Sealed):
    key: str
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Constructor(_Sealed):
    function: Callable[..., _View]

    def __call__(self, *arguments: Any) -> _View:
        return self.function(*arguments)


def is_torch_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_torch_zip(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the state dict in ``path``, by name, touching no tensor data.

    A state dict nested under ``state_dict``, ``model`` or ``module`` is found. Entries that are
    not tensors (step counters, strings) are ignored. Raises MalformedFile or UnsupportedInput.
    """
    if not is_torch_zip(path):
        raise UnsupportedInput(
            f"{path}: is not a zip-based torch file",
            hint="files of torch < 1.6 must be re-saved with a current torch first",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(path, archive)
            root = next((name[: -len("data.pkl")] for name in records if _is_pickle(name)), None)
            if root is None:
                raise MalformedFile(f"{path}: is a zip file, but not one that torch.save wrote")
            if records.get(root + "byteorder") and archive.read(root + "byteorder") != b"little":
                raise UnsupportedInput(f"{path}: was saved on a big-endian machine")
            state = _unpickle(path, archive.read(root + "data.pkl"))
    except _ZIP_ERRORS as error:
        raise MalformedFile(
            f"{path}: is a damaged or truncated zip file ({_clipped(error)})", hint="fetch it again"
        ) from None
    views = _state_dict(path, state)
    return {name: _locate(path, records, root, name, view) for name, view in views.items()}


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl")


def _records(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_ENTRIES:
        raise MalformedFile(f"{path}: holds {len(infos):,} zip entries")
    size = path.stat().st_size
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedInput(
                f"{path}: record {info.filename!r} is compressed, which torch.save never does"
            )
        if info.header_offset < 0 or info.header_offset + info.file_size > size:
            raise MalformedFile(f"{path}: record {info.filename!r} reaches past the file's end")
        if _is_pickle(info.filename) and info.file_size > MAX_PICKLE_BYTES:
            raise MalformedFile(f"{path}: its pickle is {info.file_size:,} bytes long")
    return {info.filename: info for info in infos}


class _Unpickler(pickle.Unpickler):
    """Builds descriptions of tensors; refuses every name that a state dict does not need."""

    def __init__(self, path: Path, text: bytes):
        super().__init__(io.BytesIO(text), encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if module == "torch._utils" and name in _CONSTRUCTORS:
            return _CONSTRUCTORS[name]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _ElementType(BY_NAME[_STORAGE_DTYPES[name]])
        if module == "torch" and name in _TORCH_DTYPES:
            return _ElementType(_TORCH_DTYPES[name])
        wanted = _clipped(f"{module}.{name}")
        raise UnsupportedInput(
            f"{self._path}: its pickle asks for {wanted}, which a state dict does not need",
            hint="loratool never executes pickled code; save the state dict as safetensors",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, element, key, _device, _numel = pid
        if kind != "storage" or not isinstance(element, _ElementType):
            raise ValueError("unknown storage record")
        return _Storage(str(key), element.dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> _View:
    if not isinstance(storage, _Storage) or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError("tensor record of the wrong form")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("tensor record with an impossible shape")
    return _View(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_typed(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _requires_grad: Any,
    _hooks: Any,
    element: Any,
    *_rest: Any,
) -> _View:
    """Newer dtypes: bytes with a dtype beside them; the offset counts elements all the same."""
    if not isinstance(element, _ElementType):
        raise ValueError("tensor record of the wrong form")
    return replace(_rebuild_tensor(storage, offset, shape, strides), dtype=element.dtype)


def _rebuild_parameter(data: Any, *_rest: Any) -> _View:
    if not isinstance(data, _View):
        raise ValueError("parameter record of the wrong form")
    return data


_CONSTRUCTORS = {
    "_rebuild_tensor": _Constructor(_rebuild_tensor),
    "_rebuild_tensor_v2": _Constructor(_rebuild_tensor),
    "_rebuild_tensor_v3": _Constructor(_rebuild_typed),
    "_rebuild_parameter": _Constructor(_rebuild_parameter),
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _clipped(what: object) -> str:
    text = str(what)
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]} …"


def _unpickle(path: Path, text: bytes) -> object:
    try:
        return _Unpickler(path, text).load()
    except UnsupportedInput:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        raise MalformedFile(
            f"{path}: its pickle cannot be read as a state dict "
            f"({type(error).__name__}: {_clipped(error)})"
        ) from None


def _state_dict(path: Path, state: object, depth: int = 0) -> dict[str, _View]:
    if isinstance(state, dict):
        views = {name: view for name, view in state.items() if isinstance(view, _View)}
        if views:
            if not all(isinstance(name, str) and name.isprintable() and name for name in views):
                raise MalformedFile(f"{path}: holds tensors without usable names")
            return cast(dict[str, _View], views)
        if depth < MAX_NESTING:
            for key in ("state_dict", "model", "module"):
                if isinstance(state.get(key), dict):
                    return _state_dict(path, state[key], depth + 1)
    raise UnsupportedInput(f"{path}: holds no state dict (a map of names to tensors)")


def _locate(
    path: Path, records: dict[str, zipfile.ZipInfo], root: str, name: str, view: _View
) -> TensorInfo:
    record = records.get(f"{root}data/{view.key}")
    if record is None:
        raise MalformedFile(f"{path}: the data of {name} (storage {view.key}) is missing")
    item = view.dtype.bits // 8
    numel = math.prod(view.shape)
    span = (
        1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        if numel
        else 0
    )
    if numel > span:
        raise UnsupportedInput(
            f"{path}: {name} is an expanded view of {span:,} stored values as {numel:,}"
        )
    if (view.offset + span) * item > record.file_size:
        raise MalformedFile(
            f"{path}: {name} needs {(view.offset + span) * item:,} bytes of a storage that has "
            f"{record.file_size:,}"
        )
    start = _data_start(path, record) + view.offset * item
    contiguous = view.strides == _row_major(view.shape) or numel <= 1
    strides = None if contiguous else view.strides
    return TensorInfo(name, view.dtype, view.shape, path, start, span * item, strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def _data_start(path: Path, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin: its local header has lengths of its own."""
    with open(path, "rb") as file:
        file.seek(record.header_offset)
        local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise MalformedFile(f"{path}: record {record.filename!r} has no local header")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    start = record.header_offset + 30 + name_length + extra_length
    if start + record.file_size > path.stat().st_size:
        raise MalformedFile(f"{path}: record {record.filename!r} reaches past the file's end")
    return int(start)
