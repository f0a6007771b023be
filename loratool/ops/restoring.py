"""Between a merged tensor and the base's: recording what a merge lost, and restoring it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loratool.adapter import DoraUpdate
from loratool.algebra.corrections import encode_block, neighbour
from loratool.algebra.dora_inverse import DoraInverse, add_squares, change_of
from loratool.algebra.rounding import Rounder, round_once
from loratool.errors import MalformedFile
from loratool.layouts.placing import PlacedUpdate
from loratool.layouts.scales import ScaledBy
from loratool.ops.rounders import dora_lines, rounder_of
from loratool.receipt import (
    Corrections,
    TensorRecord,
    UpdateRecord,
    bit_patterns,
    blocks_of,
    from_bit_patterns,
    update_sha256,
)
from loratool.storage.disk import disk_errors
from loratool.storage.dtypes import BY_NAME, DType
from loratool.storage.tensors import LazyTensor, TensorInfo, is_range, read_into
from loratool.storage.views import Stored, rows_of
from loratool.storage.writing import park

_HASHED_BYTES = 8 * 2**20


def guess_method(
    updates: Sequence[PlacedUpdate], merged: LazyTensor | None, shape: tuple[int, ...]
) -> str:
    """How a base tensor of ``shape`` is guessed from the merged one: a receipt's method."""
    if merged is None or merged.shape != shape or not updates:
        return "keep"
    if all_additive(updates):
        return "subtract"
    (first, *more) = updates
    return "lines" if isinstance(first.update, DoraUpdate) and not more else "keep"


def leading(merged: TensorInfo | None, shape: tuple[int, ...]) -> Stored | None:
    """The merged values of a base tensor of ``shape``: all, or the first rows of a table that got
    more of them; None where there are none such."""
    if merged is None or merged.shape == shape:
        return merged
    longer = shape and merged.shape and merged.shape[0] > shape[0]
    return rows_of(merged, 0, shape[0]) if longer and merged.shape[1:] == shape[1:] else None


def beyond(base: Mapping[str, TensorInfo], merged: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """What a merge added: tensors that the base has not, and rows beyond those of its tables."""
    added: dict[str, Stored] = {}
    for name, info in merged.items():
        if name not in base:
            added[name] = info
        elif info.shape != base[name].shape and leading(info, base[name].shape) is not None:
            added[name] = rows_of(info, base[name].rows, info.rows)
    return added


def line_norms(placed: PlacedUpdate, base: LazyTensor) -> Tensor:
    """‖W0 + s·B·A‖ of each line of a tensor that a DoRA changes, float64."""
    rows = base.shape[0]
    magnitude, by_column = dora_lines(placed)
    change = _change_alone(placed, base, rows)
    norms = torch.zeros(len(magnitude), dtype=torch.float64)
    for start, stop in blocks_of(base.shape):
        before = base.read_rows(start, stop).reshape(stop - start, -1)
        add_squares(norms, before, change_of(change, before.shape, start), start, by_column)
    return norms.sqrt()


def _change_alone(placed: PlacedUpdate, base: LazyTensor, rows: int) -> Rounder:
    """What adds the s·B·A inside a DoRA. On the CPU: what follows runs there."""
    assert isinstance(placed.update, DoraUpdate)
    inner = replace(placed, update=placed.update.low_rank, weight=1.0)
    return rounder_of([inner], base, 0, rows, device=torch.device("cpu"))


def all_additive(updates: Sequence[PlacedUpdate]) -> bool:
    """Whether taking the updates off again needs no knowledge of the base."""
    return all(update.update.is_additive for update in updates)


@dataclass(frozen=True)
class Guess:
    """The base's values as they follow from the merged ones alone, the same on every machine.

    dtype, shape: of the base's tensor. updates: what was merged, with the weights it had then.
    merged: the merged tensor, or None where there is none of that shape. norms: of the lines, for
    the method that needs them. scaled: of a tensor in 8 bits.
    """

    method: str
    dtype: DType
    shape: tuple[int, ...]
    merged: LazyTensor | None
    updates: tuple[PlacedUpdate, ...]
    device: torch.device
    norms: LazyTensor | None = None
    scaled: ScaledBy | None = None

    def rounder(self) -> Rounder | None:
        """What takes the updates off, for the whole tensor; None where nothing does."""
        if self.method == "lines":
            return self._dora_inverse()
        if self.method != "subtract":
            return None
        return self._rounder([replace(u, weight=-u.weight) for u in self.updates])

    def _dora_inverse(self) -> Rounder:
        (placed, *more) = self.updates
        assert self.merged is not None
        assert self.norms is not None
        if more or not isinstance(placed.update, DoraUpdate):
            raise MalformedFile(f"{placed.target}: the receipt has norms, the adapter no DoRA")
        magnitude, by_column = dora_lines(placed)
        if self.norms.shape != tuple(magnitude.shape):
            raise MalformedFile(f"{placed.target}: the receipt has norms for another shape")
        change = _change_alone(placed, self.merged, self.shape[0])
        return DoraInverse(change, magnitude, self.norms.read(), placed.weight, by_column)

    def adder(self) -> Rounder:
        """What puts the updates on again."""
        return self._rounder(self.updates)

    def _rounder(self, updates: Sequence[PlacedUpdate]) -> Rounder:
        assert self.merged is not None
        rows = self.shape[0] if self.shape else 1
        return rounder_of(updates, self.merged, 0, rows, device=self.device, scaled=self.scaled)

    def of_rows(
        self, rounder: Rounder | None, after: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """The guess for rows ``start:stop``, whose merged values are ``after``."""
        dtype = self.dtype.torch
        assert dtype is not None
        if after is None:
            return torch.zeros((stop - start, *self.shape[1:]), dtype=dtype)
        if rounder is None:
            return round_once(after, dtype)
        flat = after.reshape(stop - start, -1).to(self.device)
        finite = torch.isfinite(flat.float())
        flat = torch.where(finite, flat, 0)  # what overflowed tells nothing of the base
        return rounder.add_to(flat, start, dtype).values.cpu().reshape(after.shape)


def uncertain(
    guess: Tensor, after: Tensor, adder: Rounder, first_row: int, device: torch.device
) -> int:
    """How many of the guessed base weights need not be the true ones.

    A merge is a monotone function of the base weight. So the guess is certain where it merges to
    the value that is there and neither of its two neighbours does. after: the merged rows.
    """
    target = bit_patterns(after)
    shape = (guess.shape[0] if guess.ndim else 1, -1)

    def merges(bits: np.ndarray) -> np.ndarray:
        rows = from_bit_patterns(bits, guess.dtype, tuple(guess.shape)).reshape(shape)
        finite = torch.isfinite(rows.float())
        values = adder.add_to(torch.where(finite, rows, 0).to(device), first_row, after.dtype)
        same: np.ndarray = np.equal(bit_patterns(values.values), target)
        same &= finite.reshape(-1).numpy()
        return same

    bits = bit_patterns(guess)
    certain = merges(bits) & ~merges(neighbour(bits, -1)) & ~merges(neighbour(bits, 1))
    return int(certain.size - np.count_nonzero(certain))


def guess_for_record(
    base: LazyTensor,
    merged: TensorInfo | None,
    updates: tuple[PlacedUpdate, ...],
    device: torch.device,
    parked: Path,
    scaled: ScaledBy | None = None,
) -> Guess:
    """The guess that a new receipt's corrections start from. parked: a name for files beside it."""
    method = guess_method(updates, merged, base.shape)
    if method == "lines" and scaled is not None:
        method = "keep"  # 8 bits a value are not worth the norms
    fitting = leading(merged, base.shape)
    norms = None
    if method == "lines":
        values = {"norms": line_norms(updates[0], base)}
        norms = park(parked.with_name(parked.name + "-norms"), values)["norms"]
    return Guess(method, base.dtype, base.shape, fitting, updates, device, norms, scaled)


class Recorder:
    """Collects what a receipt says of one changed tensor, block by block, in order.

    parked: the file that the corrections go to until the receipt is put together.
    """

    def __init__(self, name: str, guess: Guess, parked: Path):
        self._name = name
        self._guess = guess
        self._rounder = guess.rounder()
        self._parked = parked
        self._base, self._merged = hashlib.sha256(), hashlib.sha256()
        self._misses = 0
        self._nbytes = 0
        with disk_errors(parked):
            parked.write_bytes(b"")

    def add(self, before: Tensor, after: Tensor | None, start: int, stop: int) -> None:
        """Rows ``start:stop``, one of ``blocks_of`` the tensor, as they were and became."""
        guess = self._guess.of_rows(self._rounder, after, start, stop)
        truth = bit_patterns(before)
        self._base.update(truth.data)
        if after is not None:
            self._merged.update(bit_patterns(after).data)
        code, misses = encode_block(truth, bit_patterns(guess))
        self._misses += misses
        self._nbytes += len(code)
        with disk_errors(self._parked), open(self._parked, "ab") as file:
            file.write(code)

    def record(self) -> TensorRecord:
        """The record, its corrections still parked."""
        where = TensorInfo(
            self._name, BY_NAME["U8"], (self._nbytes,), self._parked, 0, self._nbytes
        )
        return TensorRecord(
            self._guess.method,
            self._base.hexdigest(),
            self._merged.hexdigest() if self._guess.merged is not None else "",
            describe_updates(self._guess.updates),
            self._misses,
            where,
            self._guess.norms,
        )


class RestoredTensor:
    """A base tensor as a merged one and a receipt's record have it, with a file's interface.

    ``checked`` at the end says whether all that was read in order is what the receipt promises.
    """

    def __init__(self, guess: Guess, record: TensorRecord):
        assert record.corrections is not None
        assert guess.dtype.torch is not None
        self._guess = guess
        self._rounder = guess.rounder()
        self._corrections = Corrections(record.corrections, guess.shape, guess.dtype.bits // 8)

    @property
    def dtype(self) -> DType:
        return self._guess.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._guess.shape

    def restore(self, after: Tensor | None, start: int, stop: int) -> Tensor:
        """Rows ``start:stop``, one of ``blocks_of`` the tensor, from their merged values."""
        guess = self._guess.of_rows(self._rounder, after, start, stop)
        return self._corrections.correct(guess, start)

    def merged_rows(self, start: int, stop: int) -> Tensor | None:
        """The merged values of these rows, where there are any."""
        merged = self._guess.merged
        return None if merged is None else merged.read_rows(start, stop)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Any rows."""
        parts = []
        for first, last in blocks_of(self.shape):
            if first < stop and last > start:
                block = self.restore(self.merged_rows(first, last), first, last)
                parts.append(block[max(start - first, 0) : stop - first] if self.shape else block)
        if not parts:
            assert self.dtype.torch is not None
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype.torch)
        return torch.cat(parts) if self.shape else parts[0]

    def read(self) -> Tensor:
        """All values."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)


def describe_updates(updates: Sequence[PlacedUpdate]) -> tuple[UpdateRecord, ...]:
    """What a receipt says of the updates that went into one tensor."""
    return tuple(
        UpdateRecord(
            placed.adapter,
            placed.source,
            _scale(placed.update),
            update_sha256(placed.update),
        )
        for placed in updates
    )


def _scale(update: object) -> str:
    """An update's own scale, or that of the update inside it (DoRA)."""
    scale = getattr(update, "scale", None)
    if isinstance(scale, int | float):
        return float(scale).hex()
    inner = (
        (getattr(update, entry.name) for entry in fields(update)) if is_dataclass(update) else ()
    )
    return next((text for part in inner if is_dataclass(part) and (text := _scale(part))), "")


def value_sha256(info: LazyTensor) -> str:
    """SHA-256 of a tensor's bytes, row-major, whatever its dtype."""
    digest = hashlib.sha256()
    for part in byte_parts(info):
        digest.update(part)
    return digest.hexdigest()


def byte_parts(info: LazyTensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major, a part at a time."""
    if is_range(info):
        for start in range(0, info.nbytes, _HASHED_BYTES):
            part = memoryview(bytearray(min(_HASHED_BYTES, info.nbytes - start)))
            read_into(info.path, info.offset + start, part, what=info.name)
            yield part
        return
    for start, stop in blocks_of(info.shape):
        yield bit_patterns(info.read_rows(start, stop)).data
