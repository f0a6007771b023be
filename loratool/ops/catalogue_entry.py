"""One adapter or checkpoint of a catalogue, as headers and configs describe it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loratool.adapter import (
    Adapter,
    DoraUpdate,
    HadamardUpdate,
    KasaUpdate,
    KroneckerUpdate,
    LowRankUpdate,
    Update,
    module_of,
)
from loratool.errors import (
    DisagreementError,
    InputMissing,
    LoratoolError,
    MalformedFile,
    TruncatedFile,
    Unfinished,
    UnsupportedInput,
    UsageError,
)
from loratool.formats import loralib, peft
from loratool.formats.peft_config import READ_TYPES
from loratool.formats.registry import looks_like_adapter
from loratool.formats.unread import unread_format
from loratool.layouts.config import ModelConfig
from loratool.ops.catalogue_finding import Found
from loratool.ops.sources import open_adapter
from loratool.plural import counted
from loratool.provenance import fingerprint_of
from loratool.storage.checkpoint import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    WeightFile,
    open_checkpoint,
    open_weight_file,
    read_json_file,
)
from loratool.storage.hashing import sha256_of

_POINTER = b"version https://git-lfs"
_CONTAINERS = {
    ".gguf": "GGUF",
    ".h5": "Keras HDF5",
    ".msgpack": "Flax msgpack",
    ".ot": "Rust torch",
    ".onnx": "ONNX",
    ".ckpt": "Lightning or original checkpoint",
}
_HEALTH: tuple[tuple[type[Exception], str], ...] = (
    (TruncatedFile, "truncated"),
    (Unfinished, "unfinished"),
    (InputMissing, "missing"),
    (MalformedFile, "damaged"),
    (DisagreementError, "mismatch"),
    (UnsupportedInput, "unsupported"),
    (OSError, "unreadable"),
)
"""Error → the word for it; the first class that fits."""


@dataclass(frozen=True)
class Entry:
    """An adapter or a checkpoint. Sizes in bytes, ``modified`` in seconds since 1970.

    format: how it is stored, with ``read`` False where loratool cannot and ``evidence`` what gave
    it away. base: the Hub id or path that an adapter or a config names. ranks, alphas: distinct
    values, ascending. targets: last names of the modules updated. whole: parameters replaced or
    tokens trained. health: "ok" or one word for ``error``. layout: hash of names and shapes;
    scaling: of each module's alpha and scale.
    same_file: device and inode of each file. content: SHA-256 of the weight files, if asked for.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    kind: str
    format: str
    read: bool = True
    evidence: str | None = None
    base: str | None = None
    architecture: str | None = None
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    targets: tuple[str, ...] = ()
    whole: int = 0
    parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    size_bytes: int = 0
    modified: float = 0.0
    health: str = "ok"
    error: str | None = None
    fingerprint: str | None = None
    layout: str | None = None
    scaling: str | None = None
    content: str | None = None
    same_file: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "format": self.format,
            "read": self.read,
            "evidence": self.evidence,
            "base": self.base,
            "architecture": self.architecture,
            "ranks": list(self.ranks),
            "alphas": list(self.alphas),
            "scales": list(self.scales),
            "targets": list(self.targets),
            "whole": self.whole,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "files": len(self.files),
            "bytes": self.size_bytes,
            "modified": datetime.fromtimestamp(self.modified, UTC).isoformat(timespec="seconds"),
            "health": self.health,
            "error": self.error,
            "fingerprint": self.fingerprint,
            "content": self.content,
        }


def describe(found: Found) -> Entry:
    """What headers and configs say. Nothing in the files is an error: it goes into ``health``."""
    entry = Entry(found.name, found.path, found.files, "checkpoint", "unknown")
    try:
        for stage in _stages(found, entry):
            entry = stage
    except (LoratoolError, OSError) as error:
        return _ailing(entry, error)
    return entry


def content_hash(entry: Entry) -> str:
    """SHA-256 over the weight files. Raises OSError."""
    digest = hashlib.sha256()
    for path in entry.files:
        digest.update(sha256_of(path))
    return digest.hexdigest()


def _stages(found: Found, entry: Entry) -> Iterator[Entry]:
    """The entry, knowing more each time; what stops it leaves what was known before."""
    yield (entry := _with_files(entry))
    first = found.files[0]
    if first.name == peft.CONFIG_FILE:
        yield (entry := replace(entry, kind="adapter", format=peft.NAME))
        yield (entry := _with_config(entry, first))
        raise InputMissing(f"{found.path}: holds no {peft.WEIGHTS_FILE}")
    if first.suffix in _CONTAINERS:
        name = _CONTAINERS[first.suffix]
        yield replace(entry, format=name, read=False, evidence=first.suffix, health="unread")
        return
    if first.name.endswith(INDEX_SUFFIX):
        yield from _sharded(first, entry)
        return
    entry = replace(entry, format="torch" if first.suffix in PICKLE_SUFFIXES else "safetensors")
    config = first.parent / peft.CONFIG_FILE
    if first.stem == "adapter_model":
        yield (entry := replace(entry, kind="adapter", format=peft.NAME))
        if config.is_file():
            yield (entry := _with_config(entry, config))
    if _starts_with(first, _POINTER):
        problem = f"{first}: is a Git LFS pointer; the weights were not fetched"
        yield replace(entry, health="pointer", error=problem)
        return
    yield entry
    weights = [open_weight_file(path) for path in found.files]
    yield (entry := _with_tensors(entry, weights))
    keys = frozenset(name for file in weights for name in file.tensors)
    side_files = {peft.CONFIG_FILE: config.read_bytes()} if config.is_file() else {}
    if entry.kind == "adapter" or looks_like_adapter(keys, {}):
        yield from _adapter(found, replace(entry, kind="adapter"), keys, side_files)
    elif unread := unread_format(keys):
        yield replace(
            entry,
            kind="adapter",
            format=unread.name,
            read=False,
            evidence=unread.key,
            health="unread",
        )
    else:
        yield (entry := _with_model_config(entry, first.parent))
        if found.shards is not None:
            missing = found.shards - len(found.files)
            why = f"{missing} of {counted(found.shards, 'shard')} missing, and " if missing else ""
            raise InputMissing(f"{found.path}: {why}no index names the shards")


def _sharded(index: Path, entry: Entry) -> Iterator[Entry]:
    entry = replace(entry, format="torch" if ".bin" in index.name else "safetensors")
    yield (entry := _with_model_config(entry, index.parent))
    listed = read_json_file(index).get("weight_map")
    if isinstance(listed, dict):
        names = sorted({name for name in listed.values() if isinstance(name, str)})
        paths = tuple(index.parent / name for name in names if Path(name).name == name)
        if shards := tuple(path for path in paths if path.is_file()):
            yield (entry := _with_files(replace(entry, files=shards)))
    checkpoint = open_checkpoint(index)
    entry = _with_files(replace(entry, files=tuple(file.path for file in checkpoint.files)))
    yield _with_tensors(entry, checkpoint.files)


def _adapter(
    found: Found, entry: Entry, keys: frozenset[str], side_files: Mapping[str, bytes]
) -> Iterator[Entry]:
    if loralib.detect(keys, side_files):
        yield (entry := replace(entry, format=loralib.NAME))
        try:  # alpha is not stored; any will do to read the rest
            entry = _with_updates(entry, open_adapter(found.path, alpha=1.0))
        except UsageError as error:
            yield replace(entry, health="incomplete", error=error.message)
            return
        yield replace(entry, alphas=(), scales=())
        return
    yield (entry := replace(entry, format=peft.NAME))
    if not side_files:
        problem = f"{found.path}: has no {peft.CONFIG_FILE} beside it; the scale is not known"
        yield replace(entry, health="no-config", error=problem)
        return
    yield (entry := _with_config(entry, found.files[0].parent / peft.CONFIG_FILE))
    if entry.read:
        yield _with_updates(entry, open_adapter(found.path))


def _starts_with(path: Path, text: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(text)) == text


# What each source tells ------------------------------------------------------------------------


def _with_files(entry: Entry) -> Entry:
    stats = [path.stat() for path in entry.files]
    return replace(
        entry,
        size_bytes=sum(stat.st_size for stat in stats),
        modified=max(stat.st_mtime for stat in stats),
        same_file=tuple((stat.st_dev, stat.st_ino) for stat in stats),
    )


def _with_tensors(entry: Entry, files: Iterable[WeightFile]) -> Entry:
    files = list(files)
    infos = [info for file in files for info in file.tensors.values()]
    shapes = sorted((info.name, info.shape) for info in infos)
    return replace(
        entry,
        parameters=sum(info.numel for info in infos),
        dtypes=tuple(sorted({info.dtype.name for info in infos})),
        fingerprint=fingerprint_of(files),
        layout=_hash(shapes),
    )


def _hash(values: object) -> str:
    return hashlib.sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()


def _with_model_config(entry: Entry, folder: Path) -> Entry:
    path = folder / "config.json"
    if not path.is_file():
        return entry
    config = ModelConfig(read_json_file(path))
    quantised = config.values.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    stored = f"{entry.format}, {method}" if isinstance(method, str) else entry.format
    return replace(entry, format=stored, base=config.hub_name, architecture=config.architecture)


def _with_config(entry: Entry, path: Path) -> Entry:
    config = read_json_file(path)
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    name = peft.NAME
    if isinstance(kind, str) and kind != "LORA":
        name = f"{name} {kind}"
    elif config.get("use_dora"):
        name = f"{name} DoRA"
    entry = replace(entry, format=name, base=base if isinstance(base, str) and base else None)
    if isinstance(kind, str) and kind not in READ_TYPES:
        return replace(entry, read=False, evidence=f"peft_type {kind}", health="unread")
    return entry


def _with_updates(entry: Entry, adapter: Adapter) -> Entry:
    ranks, alphas, scales, targets = set(), set(), set(), set()
    scaling = []
    whole = 0
    for name, update in adapter.updates.items():
        if (low := _low_rank_part(update)) is None:
            whole += 1
            continue
        rank = low.rank if isinstance(low, LowRankUpdate) else _rank_of(low)
        if rank is not None:
            ranks.add(rank)
        alphas.add(low.alpha)
        scales.add(low.scale)
        scaling.append((name, low.alpha, low.scale))
        targets.add(_target(name))
    return replace(
        entry,
        base=adapter.base_model,
        ranks=tuple(sorted(ranks)),
        alphas=tuple(sorted(alphas)),
        scales=tuple(sorted(scales)),
        targets=tuple(sorted(targets)),
        scaling=_hash(sorted(scaling)),
        whole=whole,
    )


def _low_rank_part(update: Update) -> LowRankUpdate | HadamardUpdate | KroneckerUpdate | None:
    if isinstance(update, DoraUpdate | KasaUpdate):
        return update.low_rank
    if isinstance(update, LowRankUpdate | HadamardUpdate | KroneckerUpdate):
        return update
    return None


def _rank_of(update: HadamardUpdate | KroneckerUpdate) -> int | None:
    return update.first.rank or update.second.rank


def _target(name: str) -> str:
    """The last name of a module; of one matrix in a stack, the parameter's."""
    module = module_of(name) if name.endswith((".weight", ".bias")) else name
    return next((part for part in reversed(module.split(".")) if not part.isdecimal()), module)


def _ailing(entry: Entry, error: LoratoolError | OSError) -> Entry:
    word = next((word for kind, word in _HEALTH if isinstance(error, kind)), "damaged")
    text = error.message if isinstance(error, LoratoolError) else f"{entry.path}: {error.strerror}"
    return replace(entry, health=word, error=text)
