"""Blocks of values: how a tensor is cut up, its bits, hashes and corrections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from loratool.adapter import Update
from loratool.algebra.corrections import (
    HEADER_BYTES,
    BlockHeader,
    decode_block,
    read_block_header,
)
from loratool.errors import MalformedFile
from loratool.storage.tensors import TensorInfo, read_into

BLOCK_ELEMENTS = 2**20
DAMAGED = "the receipt is damaged; only the one that the merge wrote can restore the base"


def row_elements(shape: tuple[int, ...]) -> int:
    """How many values a row of a tensor of this shape has."""
    count = 1
    for size in shape[1:]:
        count *= size
    return count


def blocks_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The row ranges that corrections of a tensor of this shape are kept by."""
    rows = shape[0] if shape else 1
    columns = row_elements(shape)
    if rows * columns:
        step = max(1, BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def bit_patterns(values: Tensor) -> np.ndarray:
    """The values' bits as unsigned integers, row-major, in one dimension."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    raw: np.ndarray = flat.view(torch.uint8).numpy()
    return raw.view(f"<u{values.element_size()}")


def from_bit_patterns(bits: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The reverse of ``bit_patterns``."""
    raw = torch.from_numpy(np.array(bits, copy=True).view(np.uint8))
    return raw.view(dtype).reshape(shape)


class Corrections:
    """A tensor's corrections, block by block. shape, width: of the base's tensor and its values.

    Raises MalformedFile naming the receipt when blocks and tensor do not agree.
    """

    def __init__(self, info: TensorInfo, shape: tuple[int, ...], width: int):
        self._info = info
        self._width = width
        self._headers: dict[int, tuple[BlockHeader, int]] = {}
        position = 0
        for start, stop in blocks_of(shape):
            elements = (stop - start) * row_elements(shape)
            with self._named():
                header = read_block_header(self._read(position, HEADER_BYTES), elements)
                self._headers[start] = header, position + HEADER_BYTES
                position += HEADER_BYTES + header.payload_bytes(elements, width)
        if position != info.nbytes:
            with self._named():
                raise MalformedFile("does not end where the tensor's last block does")

    def correct(self, guess: Tensor, start: int) -> Tensor:
        """The true values of the block that begins at row ``start``, like the guess in shape and
        dtype."""
        bits = bit_patterns(guess)
        header, position = self._headers[start]
        with self._named():
            payload = self._read(position, header.payload_bytes(bits.size, bits.itemsize))
            truth = decode_block(header, payload, bits)
        return from_bit_patterns(truth, guess.dtype, tuple(guess.shape))

    def _read(self, position: int, count: int) -> bytes:
        if count > self._info.nbytes - position:
            raise MalformedFile("ends in the middle of a block")
        data = bytearray(count)
        where = self._info.offset + position
        read_into(self._info.path, where, memoryview(data), what=self._info.name)
        return bytes(data)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except MalformedFile as error:
            raise MalformedFile(
                f"{self._info.path}: {self._info.name} {error.message}", hint=DAMAGED
            ) from None


def update_sha256(update: Update) -> str:
    """SHA-256 of all tensors of an update, with dtypes and shapes; it depends on no names."""
    lines = []
    for tensor in update.tensors:
        values = hashlib.sha256(bit_patterns(tensor.read()).data).hexdigest()
        lines.append(f"{tensor.dtype.name} {list(tensor.shape)} {values}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
