"""A receipt from its file, which may lie: everything it says is checked against the rest of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from loratool.algebra.corrections import MOST_ELEMENTS
from loratool.errors import InputMissing, MalformedFile, UnsupportedInput
from loratool.receipt.blocks import DAMAGED, row_elements
from loratool.receipt.value import (
    METHODS,
    AdapterRecord,
    FileRecord,
    Receipt,
    TensorRecord,
    UpdateRecord,
)
from loratool.receipt.writing import FORMAT, VERSION, VOUCHED_FOR, seal
from loratool.storage.safetensors_file import parse_header, read_header
from loratool.storage.tensors import TensorInfo

_MOST_RECORD_BYTES = 500_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
            hint=DAMAGED,
        ) from None


class _Reader:
    """Parses a receipt's record; everything it says is checked against the rest of the file."""

    def __init__(self, tensors: Mapping[str, TensorInfo], sha256: str):
        self._tensors = tensors
        self._used = {"record"}
        for name, info in tensors.items():
            kind = "F64" if name.startswith("norms.") else "U8"
            if info.dtype.name != kind or len(info.shape) != 1:
                raise MalformedFile(f"{name} is not a row of {kind} values")
        if sum(info.nbytes for info in self._sealed(tensors).values()) > _MOST_RECORD_BYTES:
            raise MalformedFile("holds more than a record, headers and small files")
        if seal(self._sealed(tensors)) != sha256:
            raise MalformedFile("is not as it was written: its SHA-256 differs")
        self._record = self._parse(self._bytes("record"))

    @staticmethod
    def _sealed(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        return {n: info for n, info in tensors.items() if not n.startswith(VOUCHED_FOR)}

    def receipt(self) -> Receipt:
        adapters = tuple(self._adapter(entry) for entry in self._list(self._record, "adapters"))
        assert isinstance(self._record, dict)
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
            self._hashes("added"),
            self._hashes("kept") if "kept" in self._record else None,
        )
        self._check_layout(receipt)
        return receipt

    def _hashes(self, key: str) -> dict[str, str]:
        """Receipts of before this was recorded have none."""
        assert isinstance(self._record, dict)
        entries = self._get({key: {}} | self._record, key, dict)
        return {name: self._sha256(entries, name, name) for name in entries}

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
            if tensor.method != "same" and row_elements(info.shape) >= MOST_ELEMENTS:
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
