"""Which files a merged checkpoint consists of, and where each tensor lies in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import UnsupportedInput
from loratool.storage.checkpoint import INDEX_SUFFIX, PICKLE_SUFFIXES, Checkpoint, WeightFile
from loratool.storage.dtypes import DType
from loratool.storage.safetensors_file import encode_header, tensor_bytes
from loratool.storage.tensors import TensorInfo
from loratool.storage.views import Lengthened, Stored
from loratool.storage.writing import OutputSlot

_CONVERTED = ("F64", "F32", "F16", "BF16")
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class OutTensor:
    """One tensor of an output file. Its values come from ``source``."""

    name: str
    source: Stored
    dtype: DType
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.source.shape)

    def slot(self, path: Path) -> OutputSlot:
        """Where it goes once its file is at ``path``."""
        return OutputSlot(path, self.offset, self.dtype, self.source.shape)


@dataclass(frozen=True)
class OutFile:
    """One output file: its finished header and its tensors by offset.

    name: relative to the output. twin: the base's file that has the same header and layout.
    """

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]
    twin: Path | None

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All files of an output; ``index`` is the index file's name and content where there is one."""

    files: tuple[OutFile, ...]
    index: tuple[str, bytes] | None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Added:
    """A tensor that the base has not: what it starts from, and the file of the base it joins."""

    source: Stored
    file: Path


@dataclass(frozen=True)
class _Planned:
    name: str
    source: Stored
    dtype: DType


def lay_out(
    checkpoint: Checkpoint,
    *,
    dtype: DType | None = None,
    added: Mapping[str, Added] | None = None,
    grown: Mapping[str, int] | None = None,
    max_shard_bytes: int | None = None,
) -> Layout:
    """The base's own files, or new shards of at most ``max_shard_bytes``.

    dtype: what every float tensor becomes. added: tensors that the base has not, by name.
    grown: tensors that get this many rows. Raises UnsupportedInput
    for floats that ``dtype`` cannot be had from.
    """
    rows = grown or {}
    files = {
        file.path: [
            _planned(info.name, _lengthened(info, rows.get(info.name)), dtype)
            for info in _in_order(file)
        ]
        for file in checkpoint.files
    }
    for name, new in (added or {}).items():
        files[new.file].append(_planned(name, _lengthened(new.source, rows.get(name)), dtype))
    if max_shard_bytes is not None:
        return _resharded(checkpoint, [t for part in files.values() for t in part], max_shard_bytes)
    made = [_like(checkpoint, file, files[file.path]) for file in checkpoint.files]
    return Layout(tuple(made), _index(checkpoint, made))


def _lengthened(source: Stored, rows: int | None) -> Stored:
    return source if rows is None else Lengthened(source, rows)


def _in_order(file: WeightFile) -> list[TensorInfo]:
    return sorted(file.tensors.values(), key=lambda info: (info.offset, info.nbytes))


def _planned(name: str, source: Stored, dtype: DType | None) -> _Planned:
    if dtype is None or not source.dtype.is_float:
        return _Planned(name, source, source.dtype)
    if source.dtype.name not in _CONVERTED:
        raise UnsupportedInput(
            f"{name}: is stored as {source.dtype.name}; --dtype converts F64, F32, F16 and BF16",
            hint="leave out --dtype: such weights keep their dtype and their scales",
        )
    return _Planned(name, source, dtype)


def _like(checkpoint: Checkpoint, file: WeightFile, tensors: Sequence[_Planned]) -> OutFile:
    """The output's version of one file of the base, with the base's header where it still fits."""
    name = _safetensors_name(file.path.relative_to(checkpoint.folder))
    as_stored = len(tensors) == len(file.tensors) and all(
        tensor.dtype == tensor.source.dtype and isinstance(tensor.source, TensorInfo)
        for tensor in tensors
    )
    if file.raw_header is not None and as_stored:
        placed = (
            OutTensor(t.name, t.source, t.dtype, file.tensors[t.name].offset) for t in tensors
        )
        return OutFile(name, file.raw_header, tuple(placed), file.path)
    return _packed(name, tensors, file.metadata if file.is_safetensors else _METADATA)


def _packed(name: str, tensors: Sequence[_Planned], metadata: Mapping[str, str]) -> OutFile:
    """A file with a new header, the widest types first so that all are aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.bits)
    header, offsets = encode_header(
        {tensor.name: (tensor.dtype, tensor.source.shape) for tensor in ordered}, metadata
    )
    placed = (OutTensor(t.name, t.source, t.dtype, offsets[t.name]) for t in ordered)
    return OutFile(name, header, tuple(placed), None)


def _resharded(checkpoint: Checkpoint, tensors: Sequence[_Planned], most: int) -> Layout:
    """Shards filled in the base's order, named as transformers and diffusers name them.

    A tensor that alone is larger gets a shard of its own.
    """
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        nbytes = tensor_bytes(tensor.dtype, tensor.source.shape)
        if shards[-1] and filled + nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += nbytes
    stem = _stem(checkpoint)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    kinds = {tuple(sorted(file.metadata.items())) for file in checkpoint.files}
    metadata = dict(kinds.pop()) if len(kinds) == 1 else _METADATA
    files = [
        _packed(name, part, metadata or _METADATA) for name, part in zip(names, shards, strict=True)
    ]
    if len(files) == 1:
        return Layout(tuple(files), None)
    return Layout(
        tuple(files), (f"{stem}.safetensors{INDEX_SUFFIX}", _new_index(checkpoint, files))
    )


def _index(checkpoint: Checkpoint, files: Sequence[OutFile]) -> tuple[str, bytes] | None:
    path = checkpoint.index_path
    if path is None:
        return None
    if all(file.twin is not None for file in files):
        return path.name, path.read_bytes()
    return f"{_stem(checkpoint)}.safetensors{INDEX_SUFFIX}", _new_index(checkpoint, files)


def _new_index(checkpoint: Checkpoint, files: Sequence[OutFile]) -> bytes:
    index = dict(checkpoint.index or {})
    tensors = [tensor for file in files for tensor in file.tensors]
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.source.numel for tensor in tensors)
    metadata["total_size"] = sum(tensor.nbytes for tensor in tensors)
    index["metadata"] = metadata
    index["weight_map"] = {tensor.name: file.name for file in files for tensor in file.tensors}
    return (json.dumps(index, indent=2) + "\n").encode()


def _stem(checkpoint: Checkpoint) -> str:
    """``model`` or ``diffusion_pytorch_model``: what the names of weight files begin with."""
    if checkpoint.index_path is not None:
        entry = checkpoint.index_path.name.removesuffix(INDEX_SUFFIX)
    else:
        entry = checkpoint.files[0].path.name
    return _safetensors_name(Path(entry)).removesuffix(".safetensors")


def _safetensors_name(path: Path) -> str:
    """A weight file's name in the output, which is always a safetensors file."""
    if path.suffix not in PICKLE_SUFFIXES:
        return str(path)
    stem = path.stem
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return str(path.with_name(f"{stem}.safetensors"))
