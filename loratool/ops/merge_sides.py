"""What comes along with merged weights: config, tokenizer, code; and what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.ops.sources import Model
from loratool.storage.checkpoint import WEIGHT_SUFFIXES
from loratool.storage.copying import copy_file, link_file
from loratool.storage.disk import disk_errors
from loratool.storage.dtypes import USER_NAMES, DType
from loratool.storage.hashing import sha256_of

_CONFIG = "config.json"
_LEFT_BEHIND = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "training_args.bin",
)
"""Traces of training, which are no part of a merged model."""
_ADAPTER_KEYS = ("peft_config", "_peft_config", "adapter_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class SideFiles:
    """carried: copied as they are. config: config.json's new content where it changes. skipped:
    other weight files, which stay behind. notes: what is left out of the config."""

    folder: Path
    carried: tuple[Path, ...]
    config: bytes | None
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.carried) + len(self.config or b"")

    @property
    def names(self) -> list[str]:
        names = [str(path.relative_to(self.folder)) for path in self.carried]
        return sorted([*names, _CONFIG] if self.config is not None else names)

    def write(self, target: Path, *, link: bool) -> None:
        """Put them into ``target``; files there are replaced. Raises OutputError."""
        place = link_file if link else copy_file
        for source in self.carried:
            path = target / source.relative_to(self.folder)
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
            place(source, path)
        if self.config is not None:
            path = target / _CONFIG
            with disk_errors(path):
                path.unlink(missing_ok=True)
                path.write_bytes(self.config)


def find_side_files(
    model: Model,
    dtype: DType | None,
    *,
    untied: bool,
    tokens: tuple[int, int] | None = None,
) -> SideFiles:
    """Plan them. dtype: what the config shall say, if it changes; untied: likewise; tokens: the
    size of the vocabulary before and after, if it grows."""
    config, notes = _new_config(model.config.values, dtype, untied, tokens)
    folder, found, skipped = model.checkpoint.folder, [], []
    for path in _beside(model):
        if not path.exists():
            notes.append(
                f"left out: {path.relative_to(folder)}, a link to a file that is not there"
            )
        elif _is_of_weights(path):
            skipped.append(str(path.relative_to(folder)))
        elif config is None or path != folder / _CONFIG:
            found.append(path)
    return SideFiles(folder, tuple(found), config, tuple(skipped), tuple(notes))


def side_files_of(model: Model) -> list[Path]:
    """The small files of a checkpoint: what may come along."""
    return [path for path in _beside(model) if path.is_file() and not _is_of_weights(path)]


def _is_of_weights(path: Path) -> bool:
    """Whether a file holds weights, or the index of files that do."""
    return path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")


def hashes_of(files: Sequence[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of small files, by their name in a folder."""
    return {str(path.relative_to(folder)): sha256_of(path).hex() for path in files}


def _beside(model: Model) -> Iterator[Path]:
    checkpoint = model.checkpoint
    if checkpoint.is_single_file:
        if (checkpoint.folder / _CONFIG).is_file():
            yield checkpoint.folder / _CONFIG
        return
    ours = {file.path for file in checkpoint.files} | {checkpoint.index_path}
    for root, folders, names in os.walk(checkpoint.folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if path in ours or name.startswith(".") or name in _LEFT_BEHIND:
                continue
            if path.is_file() or not path.exists() or path.suffix in WEIGHT_SUFFIXES:
                yield path


def _new_config(
    values: Mapping[str, Any], dtype: DType | None, untied: bool, tokens: tuple[int, int] | None
) -> tuple[bytes | None, list[str]]:
    """The config's new text, or None where it may stay as it is."""
    if not values:
        return None, []
    traces = [key for key in values if key in _ADAPTER_KEYS or _is_adapter_hub(key, values[key])]
    new = {key: value for key, value in values.items() if key not in traces}
    if dtype is not None:
        new = _with_dtype(new, _config_name(dtype))
    if untied:
        new = {"tie_word_embeddings": False} | new | {"tie_word_embeddings": False}
        if "tie_word_embeddings" in (text := new.get("text_config") or {}):
            new["text_config"] = text | {"tie_word_embeddings": False}
    sized = new if tokens is None else _with_vocabulary(new, *tokens)
    notes = [f"left out of config.json: {key}, a trace of an adapter" for key in traces]
    if tokens is not None and sized == new:
        notes.append(f"config.json names no vocabulary of {tokens[0]} tokens: check its vocab_size")
    new = sized
    if new == dict(values):
        return None, notes
    return (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode(), notes


def _with_vocabulary(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """The config and its parts with vocab_size raised where it is ``before``."""
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and value == before:
            new[key] = after
        elif key.endswith("_config") and isinstance(value, dict):
            new[key] = _with_vocabulary(value, before, after)
        else:
            new[key] = value
    return new


def _is_adapter_hub(key: str, value: object) -> bool:
    return key == "adapters" and isinstance(value, dict) and "config_map" in value


def _config_name(dtype: DType) -> str:
    return next(name for name, known in USER_NAMES.items() if known == dtype)


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config and its parts, as multimodal models have them, with another dtype."""
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str):
            new[key] = name
        elif key.endswith("_config") and isinstance(value, dict):
            new[key] = _with_dtype(value, name)
        else:
            new[key] = value
    return new
