"""The safetensors container: an 8-byte length, a JSON header, the tensors' bytes.

The header is read with our own parser because a plan needs byte ranges, which the safetensors
library does not give, and because that library accepts files which contradict themselves
(duplicate keys). The rules checked here are the format's own, plus: no duplicate keys, no empty
names, no control characters or lone surrogates in names.
"""

from __future__ import annotations

import json
import math
import struct
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import MalformedFile, TruncatedFile
from loratool.storage.dtypes import BY_NAME, DType
from loratool.storage.tensors import TensorInfo

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""
_MAX_MESSAGE = 400


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file's header says. ``raw`` is the header as stored, length prefix included."""

    path: Path
    raw: bytes
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @property
    def file_size(self) -> int:
        return len(self.raw) + sum(info.nbytes for info in self.tensors.values())


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of ``path``, touching no tensor.

    Raises MalformedFile with the first contradiction found.
    """
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:  # a buffer would fetch tensors' bytes as well
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad(path, f"is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise _bad(path, f"claims a header of {length:,} bytes; the format allows 100,000,000")
        if 8 + length > size:
            raise _bad(path, f"claims a header of {length:,} bytes in a file of {size:,}")
        raw = prefix + file.read(length)
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> SafetensorsHeader:
    """What ``raw``, the header of a file of ``size`` bytes, length prefix included, says.

    The tensors refer to ``path``, which is not read. Raises MalformedFile.
    """
    if len(raw) < 8 or struct.unpack("<Q", raw[:8]) != (len(raw) - 8,):
        raise _bad(path, "its header is not as long as it claims")
    document = _parse_json(path, raw[8:])
    metadata = _metadata(path, document.pop("__metadata__", {}))
    tensors = {
        name: _tensor(path, name, entry, data_start=len(raw)) for name, entry in document.items()
    }
    _check_coverage(path, tensors.values(), data_start=len(raw), size=size)
    return SafetensorsHeader(path, raw, tensors, metadata)


def encode_header(
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header for ``tensors`` laid out in the given order, and each tensor's file offset.

    Padded with spaces so that the data starts at a multiple of 8, as the format asks. Wider types
    should come first if tensors are to be aligned; see ``aligned_order``.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    position = 0
    starts: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        nbytes = tensor_bytes(dtype, shape)
        starts[name] = position
        entries[name] = {
            "dtype": dtype.name,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}


def aligned_order(tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> list[str]:
    """Names in the order the reference writer uses: widest dtype first, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name][0].bits, name))


def tensor_bytes(dtype: DType, shape: tuple[int, ...]) -> int:
    """Size in bytes of a tensor of this dtype and shape."""
    return math.prod(shape) * dtype.bits // 8


def _bad(path: Path, problem: str) -> MalformedFile:
    if len(problem) > _MAX_MESSAGE:
        problem = f"{problem[:_MAX_MESSAGE]} …"
    return MalformedFile(f"{path}: {problem}", hint="the file is damaged; fetch it again")


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _bad(path, f"its header names {twice!r} twice")
        return result

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise MalformedFile(
            f"{path}: its header is not valid JSON ({type(error).__name__})",
            hint="is it a safetensors file? torch pickles end in .bin, .pt or .pth",
        ) from None
    if not isinstance(document, dict):
        raise _bad(path, "its header is not a JSON object")
    return document


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _bad(path, "its __metadata__ is not a map of strings")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _bits(shape: list[int], dtype: DType) -> int | None:
    """The size of a tensor; None when any product on the way exceeds what a file can hold."""
    bits = dtype.bits
    for size in shape:
        bits *= size
        if bits >= 2**63:
            return None
    return bits


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not name or any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise _bad(path, f"holds a tensor with the unusable name {name!r}")
    if not isinstance(entry, dict):
        raise _bad(path, f"tensor {name!r} is not described by an object")
    dtype_name, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = BY_NAME.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype_name!r}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise _bad(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(offset) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        raise _bad(path, f"tensor {name!r} has the impossible offsets {offsets!r}")
    bits = _bits(shape, dtype)
    if bits is None:
        raise _bad(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise _bad(
            path,
            f"tensor {name!r} claims {offsets[1] - offsets[0]:,} bytes; {dtype.name} of shape "
            f"{shape} takes {bits / 8:,.0f}",
        )
    start = data_start + offsets[0]
    return TensorInfo(name, dtype, tuple(shape), path, start, offsets[1] - offsets[0])


def _check_coverage(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            kind = "overlaps its neighbour" if info.offset < position else "leaves a hole before it"
            raise _bad(path, f"tensor {info.name!r} {kind}")
        position += info.nbytes
    if position > size:
        raise TruncatedFile(
            f"{path}: is truncated: its header promises {position:,} bytes, it has {size:,}",
            hint="the download or copy did not finish; fetch it again",
        )
    if position < size:
        raise _bad(path, f"holds {size - position:,} bytes that its header does not mention")
