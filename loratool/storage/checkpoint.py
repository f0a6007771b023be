"""A checkpoint on disk as one lazy mapping of names to tensors, however many files it has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import InputMissing, MalformedFile, UnsupportedInput
from loratool.plural import counted
from loratool.storage.journal_holder import refuse_unfinished
from loratool.storage.safetensors_file import read_header
from loratool.storage.tensors import TensorInfo
from loratool.storage.torch_zip import read_torch_zip

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (
    ".safetensors",
    *PICKLE_SUFFIXES,
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".gguf",
    ".onnx",
)
"""Files that hold weights in some form: never carried along as side files."""
INDEX_SUFFIX = ".index.json"
PIPELINE_FILE = "model_index.json"
"""What a folder of several models (a diffusers pipeline) holds instead of weights."""
MAX_JSON_BYTES = 100_000_000

ENTRY_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""What a folder's checkpoint is called: the first of these that is there."""


@dataclass(frozen=True)
class WeightFile:
    """One file of weights: its tensors in stored order and, for safetensors, its raw header."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw_header: bytes | None

    @property
    def is_safetensors(self) -> bool:
        return self.raw_header is not None


@dataclass(frozen=True)
class Checkpoint(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint.

    ``path`` is what the user named, ``folder`` the directory holding the files, ``index`` the
    parsed index file of a sharded checkpoint and ``index_path`` where it is.
    """

    path: Path
    folder: Path
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorInfo]
    index: dict[str, Any] | None = None
    index_path: Path | None = None

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def size_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def is_single_file(self) -> bool:
        """Whether the user named one weight file rather than a folder or an index."""
        return self.path.is_file() and self.index is None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a weight file, an index file, or a folder holding either. Reads headers only.

    Raises InputMissing, MalformedFile, UnsupportedInput.
    """
    if not path.exists():
        raise InputMissing(f"{path}: no such file or folder")
    entry = _entry_of_folder(path) if path.is_dir() else path
    if entry.name.endswith(INDEX_SUFFIX):
        return _open_sharded(path, entry)
    file = open_weight_file(entry)
    return Checkpoint(path, entry.parent, (file,), file.tensors)


def open_weight_file(path: Path) -> WeightFile:
    """One safetensors file or torch pickle, headers only.

    Raises InputMissing, MalformedFile, UnsupportedInput, and Unfinished for a file that was being
    changed in place.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "no such file"
        raise InputMissing(f"{path}: {what}")
    refuse_unfinished(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        return WeightFile(path, header.tensors, header.metadata, header.raw)
    if path.suffix in PICKLE_SUFFIXES:
        return WeightFile(path, read_torch_zip(path), {}, None)
    raise UnsupportedInput(
        f"{path}: not a weight file that loratool reads",
        hint="it reads .safetensors, .bin, .pt, .pth, and folders or index files of those",
    )


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises MalformedFile."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise MalformedFile(f"{path}: is over {MAX_JSON_BYTES:,} bytes long")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise MalformedFile(f"{path}: is not a JSON object")
    return value


def _entry_of_folder(folder: Path) -> Path:
    for name in ENTRY_FILES:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(
        item
        for item in folder.iterdir()
        if item.is_file()
        and (
            item.suffix in (".safetensors", *PICKLE_SUFFIXES)
            or item.name.endswith(".safetensors.index.json")
        )
        and not item.name.startswith(("adapter_model.", "loratool_receipt.", "."))
    )
    indexes = [item for item in candidates if item.name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        return indexes[0]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        if (folder / PIPELINE_FILE).is_file():
            raise InputMissing(
                f"{folder}: is a pipeline of several models",
                details=sorted(str(item.parent) for item in folder.glob("*/config.json")),
                hint="name the folder of one of them",
            )
        raise InputMissing(
            f"{folder}: holds no weights",
            hint="expected model.safetensors, model.safetensors.index.json or pytorch_model.bin",
        )
    raise InputMissing(
        f"{folder}: holds {len(candidates)} weight files and no index that names them",
        details=[item.name for item in candidates[:12]],
        hint="name the file that is meant",
    )


def _open_sharded(path: Path, index_path: Path) -> Checkpoint:
    index = read_json_file(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and isinstance(file, str) for name, file in weight_map.items()
    ):
        raise MalformedFile(f"{index_path}: has no weight_map of tensor names to files")
    names = sorted(set(weight_map.values()))
    files = {name: open_weight_file(_shard_path(index_path, name)) for name in names}
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for tensor, info in files[name].tensors.items():
            if weight_map.get(tensor) == name:
                tensors[tensor] = info
            else:
                said = weight_map.get(tensor, "nowhere")
                raise MalformedFile(
                    f"{index_path}: {tensor} lies in {name}, but the index places it in {said}",
                    hint="index and shards belong to different versions; fetch all of them again",
                )
    missing = [tensor for tensor in weight_map if tensor not in tensors]
    if missing:
        raise MalformedFile(
            f"{index_path}: names {counted(len(missing), 'tensor')} that its shards do not hold",
            details=missing[:12],
        )
    return Checkpoint(
        path, index_path.parent, tuple(files[name] for name in names), tensors, index, index_path
    )


def _shard_path(index_path: Path, name: str) -> Path:
    """The shard's path. Plain relative names only: an index must not reach outside its folder."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise MalformedFile(f"{index_path}: names the file {name!r}, outside its own folder")
    shard = index_path.parent / name
    if not shard.is_file():
        raise InputMissing(
            f"{index_path}: the shard {name} is missing", hint="the download did not finish"
        )
    return shard
