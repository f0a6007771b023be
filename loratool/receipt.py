"""What a merge leaves so that the base can be rebuilt bit for bit: value and file.

A receipt holds the base's layout (headers of its files, its index, small files that the merge
changed), which updates went in and with what scales and weights, SHA-256 of the values on both
sides and of the updates, and for each changed tensor the corrections: what must be set right in
the weights that follow from the merged ones alone (``algebra.corrections``), block by block.

It is a safetensors file: ``record`` is JSON, ``header.N`` the header of the base's Nth file,
``file.NAME`` a small file's bytes, ``corrections.NAME`` the corrections of one tensor,
``norms.NAME`` the norms of its lines where a DoRA needs them. Like every
input it may lie: sizes are checked before anything is allocated, and what is rebuilt counts only
if its hash is the recorded one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratool.adapter import Update
from loratool.algebra.corrections import (
    HEADER_BYTES,
    MOST_ELEMENTS,
    BlockHeader,
    decode_block,
    read_block_header,
)
from loratool.errors import InputMissing, MalformedFile, UnsupportedInput
from loratool.provenance import loratool_version
from loratool.storage.safetensors_file import parse_header, read_header
from loratool.storage.tensors import LazyTensor, MemoryTensor, TensorInfo, read_into
from loratool.storage.writing import write_tensors

RECEIPT_FILE = "loratool_receipt.safetensors"
VERSION = 1
FORMAT = "loratool_receipt"
BLOCK_ELEMENTS = 2**20
_MOST_RECORD_BYTES = 500_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")

METHODS = ("same", "subtract", "lines", "keep")
"""How the base's values are guessed, before corrections: ``same``: they are the merged ones.
``subtract``: the merged ones less the updates, rounded once. ``lines``: a DoRA is taken off, by the
norms of its lines (``algebra.dora_inverse``). ``keep``: the merged ones cast to the base's dtype,
or zeros where there are none of that shape."""


@dataclass(frozen=True)
class UpdateRecord:
    """One update that went into a tensor.

    adapter: which of the receipt's adapters, from 0. source: its name there. scale: the update's
    own as a hex double, empty where it has none. sha256: of its tensors.
    """

    adapter: int
    source: str
    scale: str
    sha256: str


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter that went in. weight: what it was multiplied with, as a hex double."""

    name: str
    format: str
    weight: str


@dataclass(frozen=True)
class FileRecord:
    """One of the base's files: its relative name, header as stored, and size in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the base. Hashes are of the values' bytes, row-major.

    merged_sha256: empty where the merged checkpoint has no such tensor of that shape. misses: how
    many values the guess gets wrong. corrections: where those lie. norms: what ``lines`` needs.
    """

    method: str
    base_sha256: str
    merged_sha256: str
    updates: tuple[UpdateRecord, ...] = ()
    misses: int = 0
    corrections: TensorInfo | None = None
    norms: LazyTensor | None = None


@dataclass(frozen=True)
class Receipt:
    """A receipt.

    side_files: name → bytes of those small files that the merged folder has otherwise or not at
    all. index: the name of the base's index file, or empty. pickled: the base was torch pickles,
    which are rebuilt as safetensors.
    """

    adapters: tuple[AdapterRecord, ...]
    files: tuple[FileRecord, ...]
    tensors: Mapping[str, TensorRecord]
    side_files: Mapping[str, LazyTensor]
    index: str
    pickled: bool
    made_by: str = ""

    @property
    def correction_bytes(self) -> int:
        return sum(r.corrections.nbytes for r in self.tensors.values() if r.corrections)

    def base_tensors(self, folder: Path) -> dict[str, TensorInfo]:
        """The base's tensors where they would lie if its files were in ``folder``."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            found |= parse_header(folder / file.name, file.header, file.size).tensors
        return found


# Writing --------------------------------------------------------------------------------------


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write the file; corrections are copied from where they are parked."""
    tensors: dict[str, LazyTensor] = {}
    record = {
        "loratool": loratool_version(),
        "adapters": [vars(adapter) for adapter in receipt.adapters],
        "index": receipt.index,
        "pickled": receipt.pickled,
        "files": [{"name": file.name, "size": file.size} for file in receipt.files],
        "tensors": {
            name: {
                "method": tensor.method,
                "base_sha256": tensor.base_sha256,
                "merged_sha256": tensor.merged_sha256,
                "misses": tensor.misses,
                "updates": [vars(update) for update in tensor.updates],
            }
            for name, tensor in receipt.tensors.items()
        },
    }
    tensors["record"] = as_bytes_tensor(json.dumps(record, ensure_ascii=False).encode())
    for index, file in enumerate(receipt.files):
        tensors[f"header.{index}"] = as_bytes_tensor(file.header)
    tensors |= {f"file.{name}": data for name, data in receipt.side_files.items()}
    seal = _seal(tensors)
    for name, tensor in receipt.tensors.items():
        if tensor.corrections is not None:
            tensors[f"corrections.{name}"] = tensor.corrections
        if tensor.norms is not None:
            tensors[f"norms.{name}"] = tensor.norms
    write_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "sha256": seal})


def _seal(tensors: Mapping[str, LazyTensor]) -> str:
    """SHA-256 of all but what is vouched for by the hash of the tensor it restores."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.startswith(_VOUCHED_FOR):
            digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
            digest.update(bit_patterns(tensors[name].read()).data)
    return digest.hexdigest()


def as_bytes_tensor(data: bytes) -> MemoryTensor:
    """Bytes as the tensor that a receipt stores."""
    return MemoryTensor(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _EMPTY)


_EMPTY = torch.empty(0, dtype=torch.uint8)


# Reading --------------------------------------------------------------------------------------


def read_receipt(path: Path) -> Receipt:
    """Read and validate a receipt, but for its corrections, which are read block by block.

    Raises InputMissing, MalformedFile, UnsupportedInput.
    """
    if not path.is_file():
        raise InputMissing(f"{path}: no such receipt")
    header = read_header(path)
    if header.metadata.get("format") != FORMAT:
        raise UnsupportedInput(
            f"{path}: is not a receipt", hint="merge --receipt writes loratool_receipt.safetensors"
        )
    if header.metadata.get("version") != str(VERSION):
        raise UnsupportedInput(
            f"{path}: is a receipt of version {header.metadata.get('version')!r}; this loratool "
            f"reads version {VERSION}",
            hint="use the loratool that made it, or a newer one",
        )
    try:
        return _Reader(header.tensors, header.metadata.get("sha256", "")).receipt()
    except MalformedFile as error:
        raise MalformedFile(
            error.message if error.message.startswith(str(path)) else f"{path}: {error.message}",
            hint=_DAMAGED,
        ) from None


class _Reader:
    """Parses a receipt's record; everything it says is checked against the rest of the file."""

    def __init__(self, tensors: Mapping[str, TensorInfo], seal: str):
        self._tensors = tensors
        self._used = {"record"}
        for name, info in tensors.items():
            kind = "F64" if name.startswith("norms.") else "U8"
            if info.dtype.name != kind or len(info.shape) != 1:
                raise MalformedFile(f"{name} is not a row of {kind} values")
        if sum(info.nbytes for info in self._sealed(tensors).values()) > _MOST_RECORD_BYTES:
            raise MalformedFile("holds more than a record, headers and small files")
        if _seal(self._sealed(tensors)) != seal:
            raise MalformedFile("is not as it was written: its SHA-256 differs")
        self._record = self._parse(self._bytes("record"))

    @staticmethod
    def _sealed(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        return {n: info for n, info in tensors.items() if not n.startswith(_VOUCHED_FOR)}

    def receipt(self) -> Receipt:
        adapters = tuple(self._adapter(entry) for entry in self._list(self._record, "adapters"))
        files = tuple(
            self._file(index, entry)
            for index, entry in enumerate(self._list(self._record, "files"))
        )
        entries = self._get(self._record, "tensors", dict)
        tensors = {name: self._tensor(name, entry, adapters) for name, entry in entries.items()}
        side = {
            name.removeprefix("file."): info
            for name, info in self._tensors.items()
            if name.startswith("file.")
        }
        index = self._get(self._record, "index", str)
        for name in [*side, *(file.name for file in files), *([index] if index else [])]:
            _check_relative(name)
        self._used |= {f"file.{name}" for name in side}
        if unused := set(self._tensors) - self._used:
            raise MalformedFile(f"holds {sorted(unused)[0]!r}, which its record does not mention")
        receipt = Receipt(
            adapters,
            files,
            tensors,
            side,
            index,
            self._get(self._record, "pickled", bool),
            self._get(self._record, "loratool", str),
        )
        self._check_layout(receipt)
        return receipt

    def _check_layout(self, receipt: Receipt) -> None:
        if len({file.name for file in receipt.files}) != len(receipt.files):
            raise MalformedFile("names a file of the base twice")
        layout = receipt.base_tensors(Path("base"))
        if sum(len(_names(file)) for file in receipt.files) != len(layout):
            raise MalformedFile("places a tensor of the base in two files")
        if odd := set(layout) ^ set(receipt.tensors):
            raise MalformedFile(f"its headers and its record disagree about {sorted(odd)[0]!r}")
        for name, tensor in receipt.tensors.items():
            info = layout[name]
            if tensor.misses > info.numel:
                raise MalformedFile(f"claims more differences in {name} than it has values")
            if tensor.method != "same" and _row_elements(info.shape) >= MOST_ELEMENTS:
                raise MalformedFile(f"claims corrections for rows of the size of {name}'s")

    def _tensor(self, name: str, entry: object, adapters: Sequence[AdapterRecord]) -> TensorRecord:
        method = self._get(entry, "method", str)
        if method not in METHODS:
            raise MalformedFile(f"restores {name} by the unknown method {method!r}")
        merged = self._get(entry, "merged_sha256", str)
        if merged and not _SHA256.fullmatch(merged):
            raise MalformedFile(f"has no SHA-256 of {name} as merged")
        updates = tuple(self._update(name, u, adapters) for u in self._list(entry, "updates"))
        corrections = None
        if method != "same":
            key = f"corrections.{name}"
            if key not in self._tensors:
                raise MalformedFile(f"lacks the corrections of {name}")
            self._used.add(key)
            corrections = self._tensors[key]
        norms = None
        if method == "lines":
            norms = self._tensors.get(f"norms.{name}")
            if norms is None:
                raise MalformedFile(f"lacks the norms of {name}")
            self._used.add(f"norms.{name}")
        if method in ("subtract", "lines") and not updates:
            raise MalformedFile(f"takes off {name} what it does not name")
        misses = self._count(entry, "misses")
        return TensorRecord(
            method, self._sha256(entry, name), merged, updates, misses, corrections, norms
        )

    def _update(self, name: str, entry: object, adapters: Sequence[AdapterRecord]) -> UpdateRecord:
        adapter = self._count(entry, "adapter")
        if adapter >= len(adapters):
            raise MalformedFile(f"names an adapter for {name} that it does not describe")
        scale = self._get(entry, "scale", str)
        if scale:
            hex_double(scale)
        return UpdateRecord(
            adapter,
            self._get(entry, "source", str),
            scale,
            self._sha256(entry, name, "sha256"),
        )

    def _adapter(self, entry: object) -> AdapterRecord:
        weight = self._get(entry, "weight", str)
        hex_double(weight)
        return AdapterRecord(self._get(entry, "name", str), self._get(entry, "format", str), weight)

    def _file(self, index: int, entry: object) -> FileRecord:
        header = self._bytes(f"header.{index}")
        self._used.add(f"header.{index}")
        return FileRecord(self._get(entry, "name", str), header, self._count(entry, "size"))

    def _bytes(self, name: str) -> bytes:
        info = self._tensors.get(name)
        if info is None:
            raise MalformedFile(f"lacks its {name}")
        return info.read().numpy().tobytes()

    def _parse(self, text: bytes) -> object:
        try:
            return json.loads(text.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise MalformedFile(f"its record is not valid JSON ({type(error).__name__})") from None

    def _get(self, entry: object, key: str, kind: type[Any]) -> Any:
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind):
            raise MalformedFile(f"its record has no proper {key!r}")
        return value

    def _list(self, entry: object, key: str) -> list[Any]:
        value = self._get(entry, key, list)
        assert isinstance(value, list)
        return value

    def _count(self, entry: object, key: str) -> int:
        value = self._get(entry, key, int)
        if isinstance(value, bool) or not 0 <= value < 2**63:
            raise MalformedFile(f"its record has the impossible {key} {value!r}")
        assert isinstance(value, int)
        return value

    def _sha256(self, entry: object, name: str, key: str = "base_sha256") -> str:
        value = self._get(entry, key, str)
        if not _SHA256.fullmatch(value):
            raise MalformedFile(f"has no SHA-256 of {name}")
        assert isinstance(value, str)
        return value


def hex_double(text: str) -> float:
    """The double that ``float.hex`` wrote. Raises MalformedFile."""
    try:
        value = float.fromhex(text)
    except (ValueError, OverflowError):
        raise MalformedFile(f"has {text[:40]!r} where a number in hexadecimal is due") from None
    if value.hex() != text or not np.isfinite(value):
        raise MalformedFile(f"has {text[:40]!r} where a number in hexadecimal is due")
    return value


def _names(file: FileRecord) -> Mapping[str, TensorInfo]:
    return parse_header(Path(file.name), file.header, file.size).tensors


def _check_relative(name: str) -> None:
    parts = PurePosixPath(name).parts
    odd = not parts or PurePosixPath(name).is_absolute() or ".." in parts
    if odd or "\\" in name or "\0" in name or any(part.startswith(".") for part in parts):
        raise MalformedFile(f"names the file {name!r}, outside its own folder")


# Blocks and hashes ----------------------------------------------------------------------------


def _row_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count


def blocks_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The row ranges that corrections of a tensor of this shape are kept by."""
    rows = shape[0] if shape else 1
    columns = _row_elements(shape)
    if rows * columns:
        step = max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def bit_patterns(values: Tensor) -> np.ndarray:
    """The values' bits as unsigned integers, row-major, in one dimension."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    raw: np.ndarray = flat.view(torch.uint8).numpy()
    return raw.view(f"<u{values.element_size()}")


def from_bit_patterns(bits: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The reverse of ``bit_patterns``."""
    raw = torch.from_numpy(np.array(bits, copy=True).view(np.uint8))
    return raw.view(dtype).reshape(shape)


class Corrections:
    """A tensor's corrections, block by block. shape, width: of the base's tensor and its values.

    Raises MalformedFile naming the receipt when blocks and tensor do not agree.
    """

    def __init__(self, info: TensorInfo, shape: tuple[int, ...], width: int):
        self._info = info
        self._width = width
        self._headers: dict[int, tuple[BlockHeader, int]] = {}
        position = 0
        for start, stop in blocks_of(shape):
            elements = (stop - start) * _row_elements(shape)
            with self._named():
                header = read_block_header(self._read(position, HEADER_BYTES), elements)
                self._headers[start] = header, position + HEADER_BYTES
                position += HEADER_BYTES + header.payload_bytes(elements, width)
        if position != info.nbytes:
            with self._named():
                raise MalformedFile("does not end where the tensor's last block does")

    def correct(self, guess: Tensor, start: int) -> Tensor:
        """The true values of the block that begins at row ``start``, like the guess in shape and
        dtype."""
        bits = bit_patterns(guess)
        header, position = self._headers[start]
        with self._named():
            payload = self._read(position, header.payload_bytes(bits.size, bits.itemsize))
            truth = decode_block(header, payload, bits)
        return from_bit_patterns(truth, guess.dtype, tuple(guess.shape))

    def _read(self, position: int, count: int) -> bytes:
        if count > self._info.nbytes - position:
            raise MalformedFile("ends in the middle of a block")
        data = bytearray(count)
        where = self._info.offset + position
        read_into(self._info.path, where, memoryview(data), what=self._info.name)
        return bytes(data)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except MalformedFile as error:
            raise MalformedFile(
                f"{self._info.path}: {self._info.name} {error.message}", hint=_DAMAGED
            ) from None


_VOUCHED_FOR = ("corrections.", "norms.")
_DAMAGED = "the receipt is damaged; only the one that the merge wrote can restore the base"


def update_sha256(update: Update) -> str:
    """SHA-256 of all tensors of an update, with dtypes and shapes; it depends on no names."""
    lines = []
    for tensor in update.tensors:
        values = hashlib.sha256(bit_patterns(tensor.read()).data).hexdigest()
        lines.append(f"{tensor.dtype.name} {list(tensor.shape)} {values}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
