"""Which files below folders belong together: an adapter, a sharded checkpoint, a single file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratool.errors import InputMissing
from loratool.formats import peft
from loratool.storage.checkpoint import ENTRY_FILES, INDEX_SUFFIX, PICKLE_SUFFIXES
from loratool.storage.walking import Listing, walk

_ADAPTER_FILES = (peft.WEIGHTS_FILE, "adapter_model.bin")
_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".ckpt", ".npz", ".tflite")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_TRAINER_FILES = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state(_\d+)?|random_states_\d+)\.\w+"
)
"""What trainers leave beside weights."""
_RECEIPT = "loratool_receipt."
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True)
class Found:
    """Files that are one thing. name: as the listing shows it. path: what to open.

    files: those with the weights that are there, in order; of a sharded checkpoint with an index
    only the index. shards: how many there should be where a name says so and no index does.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    shards: int | None = None


@dataclass
class Search:
    """Goes through folders once. unreadable: folders that could not be looked into, and why."""

    roots: Sequence[Path]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    no_weights: int = 0
    """Files that are called as weights are, and hold something else."""

    def __iter__(self) -> Iterator[Found]:
        """Raises InputMissing for a root that is not there."""
        for root in self.roots:
            if not root.exists():
                raise InputMissing(f"{root}: no such file or folder")
        seen: set[Path] = set()
        for root in self.roots:
            if root.is_file():
                yield Found(str(root), root, (root,))
                continue
            for listing in walk(root):
                folder = listing.folder.resolve()
                if folder in seen:
                    continue
                seen.add(folder)
                label = self._label(root, listing.folder)
                if listing.problem is not None:
                    self.unreadable.append((label, listing.problem))
                yield from self._in_folder(label, listing)

    def _label(self, root: Path, folder: Path) -> str:
        relative = folder.relative_to(root)
        if len(self.roots) > 1:
            return str(root / relative)
        return str(relative) if relative != Path() else (root.resolve().name or str(root))

    def _in_folder(self, label: str, listing: Listing) -> Iterator[Found]:
        folder = listing.folder
        left = dict.fromkeys(listing.files)

        def take(*names: str) -> tuple[Path, ...]:
            present = [name for name in names if name in left]
            for name in present:
                del left[name]
            return tuple(folder / name for name in present)

        if adapter := take(*_ADAPTER_FILES):
            yield Found(label, folder, adapter[:1])
            take(peft.CONFIG_FILE)
        elif not any(name.endswith((".safetensors", *PICKLE_SUFFIXES)) for name in left) and (
            config := take(peft.CONFIG_FILE)
        ):
            yield Found(label, folder, config)
        named_by_folder = next((name for name in ENTRY_FILES if name in left), None)

        def found(name: str, files: tuple[Path, ...], shards: int | None = None) -> Found:
            if name == named_by_folder:
                return Found(label, folder, files, shards)
            inside = name if folder in self.roots and len(self.roots) == 1 else f"{label}/{name}"
            return Found(inside, folder / name, files, shards)

        for index in [name for name in left if name.endswith(INDEX_SUFFIX)]:
            yield found(index, take(index))
            stem = index.removesuffix(INDEX_SUFFIX).rpartition(".")[0]
            take(*[n for n in left if (part := _SHARD.fullmatch(n)) and part[1] == stem])
        for name in list(left):
            if name not in left or not self._holds_weights(folder / name):
                continue
            if part := _SHARD.fullmatch(name):
                stem, _, total, suffix = part.groups()
                same = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-{total}{re.escape(suffix)}")
                files = take(*[other for other in left if same.fullmatch(other)])
                yield found(f"{stem}-*-of-{total}{suffix}", files, int(total))
            else:
                yield found(name, take(name))

    def _holds_weights(self, path: Path) -> bool:
        if path.name.startswith(_RECEIPT) or _TRAINER_FILES.fullmatch(path.name):
            return False
        if path.suffix == ".safetensors" or path.suffix in _OTHER_WEIGHTS:
            return True
        if path.suffix not in PICKLE_SUFFIXES:
            return False
        try:
            with open(path, "rb") as file:
                start = file.read(4)
        except OSError:
            return True
        if start.startswith(_PICKLE_STARTS) or not start:
            return True
        self.no_weights += 1
        return False
