"""The only resolver of a path into a Checkpoint or an Adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratool.adapter import Adapter
from loratool.errors import InputMissing, UnsupportedInput, UsageError
from loratool.formats import loralib, peft
from loratool.formats.hints import Hints
from loratool.formats.registry import (
    AdapterFile,
    decode_adapter,
    looks_like_adapter,
    refuse_unread_format,
    stores_alpha,
)
from loratool.layouts.config import ModelConfig
from loratool.storage.checkpoint import (
    MAX_JSON_BYTES,
    Checkpoint,
    open_checkpoint,
    open_weight_file,
    read_json_file,
)
from loratool.storage.dtypes import DType
from loratool.storage.hashing import sha256_of
from loratool.storage.tensors import TensorInfo

_ADAPTER_WEIGHTS = (peft.WEIGHTS_FILE, "adapter_model.bin", loralib.WEIGHTS_FILE)


@dataclass(frozen=True)
class Model:
    """A checkpoint with its config."""

    checkpoint: Checkpoint
    config: ModelConfig

    @property
    def paths(self) -> list[Path]:
        """What was named, and every weight file and index behind it."""
        index = [self.checkpoint.index_path] if self.checkpoint.index_path else []
        return [self.checkpoint.path, *(file.path for file in self.checkpoint.files), *index]


def open_model(path: Path) -> Model:
    """A checkpoint from a file, an index or a folder; config.json beside it is read if there.

    Raises InputMissing, MalformedFile, UnsupportedInput; the last also for an adapter.
    """
    if (
        path.is_dir()
        and (path / peft.CONFIG_FILE).is_file()
        and not (path / "config.json").exists()
    ):
        raise UnsupportedInput(f"{path}: is an adapter; a checkpoint is needed here")
    checkpoint = open_checkpoint(path)
    if looks_like_adapter(frozenset(checkpoint.tensors), {}):
        raise UnsupportedInput(f"{path}: is an adapter; a checkpoint is needed here")
    refuse_unread_format(str(path), frozenset(checkpoint.tensors))
    return Model(checkpoint, ModelConfig(_config_beside(checkpoint)))


def measurable(info: TensorInfo, dtypes: Sequence[DType]) -> TensorInfo:
    """The tensor, where its dtype is one that a measurement reads. Raises UnsupportedInput."""
    if info.dtype not in dtypes:
        bits = [str(number) for number in sorted({dtype.bits for dtype in dtypes})]
        raise UnsupportedInput(
            f"{info.name}: is {info.dtype.name}; only weights of {', '.join(bits[:-1])} or "
            f"{bits[-1]} bits are measured",
            hint="name the checkpoint that it was quantised from",
        )
    return info


def open_adapter(
    path: Path, alpha: float | None = None, fused_parts: tuple[bool, ...] = ()
) -> Adapter:
    """An adapter of any known format from a file or a folder. Headers and config only.

    alpha, fused_parts: see ``formats.hints``, for files that do not say.

    Raises InputMissing, MalformedFile, UnsupportedInput, Unplaced, UsageError.
    """
    return decode_adapter(_adapter_file(path), Hints(alpha, fused_parts))


def open_adapters(paths: Sequence[Path], alpha: float | None = None) -> list[Adapter]:
    """Adapters of mixed formats; ``alpha`` goes to those that do not store it.

    Raises what ``open_adapter`` raises, and UsageError for an alpha that none of them needs.
    """
    if alpha is None or len(paths) == 1:
        return [open_adapter(path, alpha) for path in paths]
    files = [_adapter_file(path) for path in paths]
    if all(stores_alpha(file) for file in files):
        raise UsageError("every adapter stores its own alpha; --alpha is for those that do not")
    return [decode_adapter(file, Hints(None if stores_alpha(file) else alpha)) for file in files]


def needs_alpha(path: Path) -> bool:
    """Whether an adapter's format does not store alpha. Raises InputMissing, UnsupportedInput."""
    return not stores_alpha(_adapter_file(path))


def _adapter_file(path: Path) -> AdapterFile:
    if not path.exists():
        raise InputMissing(f"{path}: no such file or folder")
    weights = _adapter_weights(path) if path.is_dir() else path
    config = weights.parent / peft.CONFIG_FILE
    side_files = {peft.CONFIG_FILE: _small_file(config)} if config.is_file() else {}
    return AdapterFile(str(path), open_weight_file(weights).tensors, side_files)


def adapter_sha256(path: Path) -> str:
    """SHA-256 of an adapter's weights and of the config beside them. Raises InputMissing."""
    weights = _adapter_weights(path) if path.is_dir() else path
    if not weights.is_file():
        raise InputMissing(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    for file in (weights, weights.parent / peft.CONFIG_FILE):
        if file.is_file():
            digest.update(sha256_of(file))
    return digest.hexdigest()


def is_adapter(path: Path) -> bool:
    """Whether ``path`` holds an adapter rather than a checkpoint."""
    if path.is_dir():
        return any((path / name).is_file() for name in _ADAPTER_WEIGHTS)
    if not path.is_file() or path.name.endswith(".json"):
        return False
    return looks_like_adapter(frozenset(open_weight_file(path).tensors), {})


def _adapter_weights(folder: Path) -> Path:
    for name in _ADAPTER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputMissing(
        f"{folder}: holds no adapter", hint=f"expected {peft.CONFIG_FILE} and {peft.WEIGHTS_FILE}"
    )


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise UnsupportedInput(f"{path}: is over {MAX_JSON_BYTES:,} bytes long")
    return path.read_bytes()


def _config_beside(checkpoint: Checkpoint) -> dict[str, object]:
    path = checkpoint.folder / "config.json"
    return read_json_file(path) if path.is_file() else {}
