"""What a receipt says: its parts as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratool.storage.safetensors_file import parse_header
from loratool.storage.tensors import LazyTensor, TensorInfo

RECEIPT_FILE = "loratool_receipt.safetensors"

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
    which are rebuilt as safetensors. added: SHA-256 of merged tensors that the base has not, and of
    the rows that merged tables have beyond the base's. kept: SHA-256 of those small files that the
    merged folder has as the base has them; None where that is not recorded.
    """

    adapters: tuple[AdapterRecord, ...]
    files: tuple[FileRecord, ...]
    tensors: Mapping[str, TensorRecord]
    side_files: Mapping[str, LazyTensor]
    index: str
    pickled: bool
    made_by: str = ""
    added: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] | None = None

    @property
    def correction_bytes(self) -> int:
        return sum(r.corrections.nbytes for r in self.tensors.values() if r.corrections)

    def base_tensors(self, folder: Path) -> dict[str, TensorInfo]:
        """The base's tensors where they would lie if its files were in ``folder``."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            found |= parse_header(folder / file.name, file.header, file.size).tensors
        return found
