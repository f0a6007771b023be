"""The adapter formats loratool reads, tried in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from loratool.adapter import Adapter
from loratool.errors import UnsupportedInput
from loratool.formats import loralib, peft
from loratool.formats.hints import NOTHING, Hints
from loratool.formats.unread import unread_format
from loratool.storage.tensors import LazyTensor


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's raw parts: its tensors and the small files beside them. ``label`` names it."""

    label: str
    tensors: Mapping[str, LazyTensor]
    side_files: Mapping[str, bytes]


class Codec(Protocol):
    """One format: recognise it, read it. STORES_ALPHA: whether its files say what alpha is."""

    NAME: str
    STORES_ALPHA: bool

    def detect(self, keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
        """Whether these look like this format's."""

    def decode(
        self,
        label: str,
        tensors: Mapping[str, LazyTensor],
        side_files: Mapping[str, bytes],
        hints: Hints,
    ) -> Adapter:
        """Read it. What cannot be placed is an error that names it."""


CODECS: tuple[Codec, ...] = (peft, loralib)


def refuse_unread_format(label: str, keys: frozenset[str]) -> None:
    """An adapter in a format without a codec must not pass for a checkpoint.

    Raises UnsupportedInput naming a key.
    """
    found = unread_format(keys)
    if found is not None:
        raise UnsupportedInput(
            f"{label}: looks like an adapter in a format that loratool does not read",
            details=[f"for example: {found.key}"],
            hint="it reads: " + ", ".join(codec.NAME for codec in CODECS),
        )


def looks_like_adapter(keys: frozenset[str], side_files: Mapping[str, bytes]) -> bool:
    """Whether any known format claims these keys."""
    return any(codec.detect(keys, side_files) for codec in CODECS)


def decode_adapter(file: AdapterFile, hints: Hints = NOTHING) -> Adapter:
    """Read an adapter of any known format.

    ``hints`` supplies what the file does not hold. Raises UnsupportedInput, MalformedFile,
    Unplaced, UsageError.
    """
    return _codec_of(file).decode(file.label, file.tensors, file.side_files, hints)


def stores_alpha(file: AdapterFile) -> bool:
    """Whether an adapter's format says what alpha is. Raises UnsupportedInput."""
    return _codec_of(file).STORES_ALPHA


def _codec_of(file: AdapterFile) -> Codec:
    keys = frozenset(file.tensors)
    for codec in CODECS:
        if codec.detect(keys, file.side_files):
            return codec
    raise UnsupportedInput(
        f"{file.label}: no known adapter format",
        details=[f"first keys: {', '.join(sorted(keys)[:3])}"],
        hint="known formats: " + ", ".join(codec.NAME for codec in CODECS),
    )
