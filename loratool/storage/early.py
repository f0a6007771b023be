"""Copying tensors into a file whose header is foreseen, while others are being computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from loratool.errors import LoratoolError
from loratool.storage.tensors import LazyTensor, TensorInfo, is_range
from loratool.storage.writing import (
    OutputSlot,
    copy_range,
    create_safetensors,
    shapes_of,
)

_PIECE_BYTES = 64 * 2**20
"""Copied between two looks at whether to go on. A multiple of any block of a disk."""


class EarlyFile:
    """A safetensors file begun before all of its tensors are known.

    What is foreseen is a guess, held against the truth in ``finish``: where they differ, or the
    copying failed, the file is removed again, as if nothing had been begun.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
    ) -> None:
        """tensors: all of the file's, as they will be if the guess is right; those that are ranges
        of files are copied."""
        self._path, self._tensors, self._metadata = path, tensors, metadata
        self._stop = threading.Event()
        # Thread.join says that a thread has ended when Ctrl-C interrupted it (Python before 3.13)
        self._ended: threading.Event | None = None
        self._copied: set[str] = set()
        self.seconds = 0.0

    def begin(self) -> None:
        """Start copying beside whatever else is done."""
        if not self._stop.is_set():
            ended = threading.Event()
            threading.Thread(target=self._copy, args=(ended,), daemon=True).start()
            self._ended = ended

    def give_up(self) -> None:
        """The guess is wrong: copy no more. Does not wait."""
        self._stop.set()

    def finish(self, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> set[str]:
        """Wait for the copies, and name the tensors that are in place in the file.

        tensors, metadata: what the file holds in truth. An empty set: there is no file.
        """
        found, foreseen = (list(shapes_of(some).items()) for some in (tensors, self._tensors))
        if (found, metadata) != (foreseen, self._metadata):
            self.give_up()
        self._wait()
        placed = {name for name in self._copied if tensors.get(name) == self._tensors[name]}
        if self._stop.is_set() or not placed:
            self._path.unlink(missing_ok=True)
            return set()
        return placed

    def close(self) -> None:
        """Stop, wait until nothing is written any more, and remove the file unless it was moved."""
        self.give_up()
        self._wait()
        self._path.unlink(missing_ok=True)

    def _wait(self) -> None:
        if self._ended is not None:
            self._ended.wait()

    def _copy(self, ended: threading.Event) -> None:
        begun = time.perf_counter()
        try:
            slots = create_safetensors(self._path, shapes_of(self._tensors), self._metadata)
            for name, tensor in self._tensors.items():
                if is_range(tensor) and self._copy_range(tensor, slots[name]):
                    self._copied.add(name)
        except (OSError, LoratoolError):
            self.give_up()  # writing in the ordinary way will meet it again, and say so
        finally:
            self.seconds = time.perf_counter() - begun
            ended.set()

    def _copy_range(self, tensor: TensorInfo, slot: OutputSlot) -> bool:
        """Whether it was copied to its end."""
        start = 0
        while start < tensor.nbytes and not self._stop.is_set():
            # pieces end where a block of the file does
            stop = min(start + _PIECE_BYTES - (slot.offset + start) % _PIECE_BYTES, tensor.nbytes)
            copy_range(
                tensor.path, tensor.offset + start, slot.path, slot.offset + start, stop - start
            )
            start = stop
        return start == tensor.nbytes
