"""What turns a guessed block of values into the true one, in as few bits as that takes.

A guess differs from the truth at few positions, and there mostly by one unit in the last place.
Positions are an Elias–Fano code (Elias, 1974; Fano, 1971): the low bits of each packed, the high
parts as a bitmap in which one bit is set per position. Differences are counted in steps of the
ordered values of the dtype; their sizes are Elias gamma codes (Elias, 1975) with the unary parts
in one stream and the binary ones in another, which makes both vectorisable, and a bit of sign.
A block whose code would be no shorter than its values holds the values.

Layout, little-endian: mode (0 coded, 1 values), low bits per position, number of differences,
length of the unary stream in bits; then the streams: low parts, high parts, signs, unary, binary.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from loratool.errors import MalformedFile

_HEADER = struct.Struct("<BBII")
HEADER_BYTES = _HEADER.size
_CODED, _VALUES = 0, 1
_MOST_LOW_BITS = 31
MOST_ELEMENTS = 2**30
"""Of one block; its positions and counts then fit the format."""

_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_CODED_WIDTHS = (1, 2, 4)


@dataclass(frozen=True)
class BlockHeader:
    """The first bytes of a block: how it is stored, and so how long it is."""

    mode: int
    low_bits: int
    misses: int
    unary_bits: int

    def payload_bytes(self, elements: int, width: int) -> int:
        """How many bytes follow, for a block of ``elements`` values of ``width`` bytes."""
        if self.mode == _VALUES:
            return elements * width
        return sum(self.stream_bytes(elements))

    def stream_bytes(self, elements: int) -> list[int]:
        """Lengths of the five streams of a coded block."""
        if not self.misses:
            return [0] * 5
        bits = [
            self.misses * self.low_bits,
            self.misses + ((elements - 1) >> self.low_bits) + 1,
            self.misses,
            self.unary_bits,
            self.unary_bits - self.misses,
        ]
        return [-(-count // 8) for count in bits]


def encode_block(truth: np.ndarray, guess: np.ndarray) -> tuple[bytes, int]:
    """The code of a block, and how many values the guess misses.

    truth, guess: contiguous bit patterns of one floating dtype as unsigned integers, equal in
    shape and width. Both signs of zero, infinities and NaN patterns are patterns like others.
    """
    width, elements = truth.dtype.itemsize, truth.size
    if elements >= MOST_ELEMENTS:
        raise AssertionError(f"a block of {elements} values")
    truth, guess = truth.reshape(-1), guess.reshape(-1)
    positions = np.flatnonzero(truth != guess)
    misses = len(positions)
    if not misses:
        return _HEADER.pack(_CODED, 0, 0, 0), 0
    values = _HEADER.pack(_VALUES, 0, misses, 0) + truth.tobytes()
    if width not in _CODED_WIDTHS:
        return values, misses
    steps = _ordered(truth[positions]) - _ordered(guess[positions])
    sizes = np.abs(steps)
    classes = _bit_lengths(sizes)
    unary_bits = int(classes.sum())
    low_bits = _best_low_bits(misses, elements)
    highs = (positions >> low_bits) + np.arange(misses)
    streams = [
        _pack_fixed(positions & ((1 << low_bits) - 1), low_bits),
        _bitmap(highs, misses + ((elements - 1) >> low_bits) + 1),
        np.packbits(steps < 0).tobytes(),
        _bitmap(np.cumsum(classes) - 1, unary_bits),
        _pack_by_class(sizes, classes),
    ]
    code = _HEADER.pack(_CODED, low_bits, misses, unary_bits) + b"".join(streams)
    return (code if len(code) < len(values) else values), misses


def read_block_header(data: bytes, elements: int) -> BlockHeader:
    """Parse and bound a block's header. Raises MalformedFile."""
    if len(data) < HEADER_BYTES:
        raise MalformedFile("ends in the middle of a block")
    header = BlockHeader(*_HEADER.unpack_from(data))
    if header.mode not in (_CODED, _VALUES):
        raise MalformedFile(f"has a block of the unknown mode {header.mode}")
    if header.misses > elements:
        raise MalformedFile(f"claims {header.misses:,} differences in {elements:,} values")
    fits = header.misses <= header.unary_bits <= header.misses * 33
    if header.mode == _CODED and (header.low_bits > _MOST_LOW_BITS or not fits):
        raise MalformedFile("has a block whose header contradicts itself")
    return header


def decode_block(header: BlockHeader, payload: bytes, guess: np.ndarray) -> np.ndarray:
    """The true bit patterns, in the guess's shape.

    guess: unsigned bit patterns. Raises MalformedFile for a code that contradicts itself; what it
    allocates is bounded by the block's size.
    """
    elements, width = guess.size, guess.dtype.itemsize
    if len(payload) != header.payload_bytes(elements, width):
        raise MalformedFile("ends in the middle of a block")
    if header.mode == _VALUES:
        return np.frombuffer(payload, guess.dtype).reshape(guess.shape)
    if not header.misses:
        return guess
    if width not in _CODED_WIDTHS:
        raise MalformedFile(f"codes differences of values of {width} bytes, which it cannot")
    lengths = header.stream_bytes(elements)
    ends = np.cumsum(lengths)
    raw = np.frombuffer(payload, np.uint8)
    low, high, sign, unary, binary = (
        raw[end - length : end] for end, length in zip(ends, lengths, strict=True)
    )
    positions = _positions(header, low, high, elements)
    sizes = _unpack_by_class(_gaps(unary, header.misses, header.unary_bits), binary)
    negative = np.unpackbits(sign, count=header.misses).astype(bool)
    ordered = _ordered(guess.reshape(-1)[positions]) + np.where(negative, -sizes, sizes)
    limit = 1 << (8 * width - 1)
    if len(ordered) and not (-limit <= ordered.min() and ordered.max() < limit):
        raise MalformedFile("corrects a value to one that its dtype does not have")
    truth = guess.reshape(-1).copy()
    truth[positions] = _unordered(ordered, guess.dtype)
    return truth.reshape(guess.shape)


def neighbour(bits: np.ndarray, step: int) -> np.ndarray:
    """Bit patterns ``step`` places further in the order of the values; −0 comes just before 0."""
    ordered = _ordered(bits) + step
    limit = 1 << (8 * bits.dtype.itemsize - 1)
    return _unordered(np.clip(ordered, -limit, limit - 1), bits.dtype)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Bit patterns as integers in the order of the values they stand for; −0 just below 0."""
    width = bits.dtype.itemsize
    signed = bits.view(_SIGNED[width]).astype(np.int64)
    most = (1 << (8 * width - 1)) - 1
    return np.where(signed < 0, signed ^ most, signed)


def _unordered(ordered: np.ndarray, dtype: np.dtype) -> np.ndarray:
    most = (1 << (8 * dtype.itemsize - 1)) - 1
    return (
        np.where(ordered < 0, ordered ^ most, ordered).astype(_SIGNED[dtype.itemsize]).view(dtype)
    )


def _bit_lengths(values: np.ndarray) -> np.ndarray:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _best_low_bits(misses: int, elements: int) -> int:
    sizes = [misses * k + ((elements - 1) >> k) for k in range(_MOST_LOW_BITS + 1)]
    return int(np.argmin(sizes))


def _pack_fixed(values: np.ndarray, bits: int) -> bytes:
    """Each value in ``bits`` bits, highest first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((values[:, None] >> shifts & 1).astype(bool)).tobytes()


def _unpack_fixed(bits: np.ndarray, width: int) -> np.ndarray:
    weights = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
    return bits.reshape(-1, width).astype(np.int64) @ weights


def _bitmap(positions: np.ndarray, length: int) -> bytes:
    bits = np.zeros(length, bool)
    bits[positions] = True
    return np.packbits(bits).tobytes()


def _positions(header: BlockHeader, low: np.ndarray, high: np.ndarray, elements: int) -> np.ndarray:
    count, width = header.misses, header.low_bits
    highs = np.flatnonzero(np.unpackbits(high)) - np.arange(int(_ones(high)))
    if len(highs) != count:
        raise MalformedFile(f"promises {count:,} positions and holds {len(highs):,}")
    positions = highs << width
    if width:
        positions |= _unpack_fixed(np.unpackbits(low, count=count * width), width)
    if positions[-1] >= elements or bool((np.diff(positions) <= 0).any()):
        raise MalformedFile("has positions out of order or out of range")
    return positions


def _ones(stream: np.ndarray) -> int:
    return int(np.unpackbits(stream).sum())


def _gaps(unary: np.ndarray, count: int, length: int) -> np.ndarray:
    """Lengths of the unary codes: each ends with a set bit."""
    ends = np.flatnonzero(np.unpackbits(unary, count=length))
    if len(ends) != count or ends[-1] != length - 1:
        raise MalformedFile("has a block whose unary codes do not end")
    gaps = np.diff(ends, prepend=-1)
    if gaps.max() > 33:
        raise MalformedFile("has a block with an impossible difference")
    return gaps


def _pack_by_class(sizes: np.ndarray, classes: np.ndarray) -> bytes:
    """What follows the leading one of each size, all of one length together."""
    parts = []
    for bits in range(2, int(classes.max()) + 1):
        chosen = sizes[classes == bits]
        shifts = np.arange(bits - 2, -1, -1)
        parts.append((chosen[:, None] >> shifts & 1).astype(bool).reshape(-1))
    return np.packbits(np.concatenate(parts)).tobytes() if parts else b""


def _unpack_by_class(classes: np.ndarray, stream: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(stream)
    sizes = np.ones(len(classes), np.int64)
    start = 0
    for width in range(2, int(classes.max()) + 1):
        chosen = classes == width
        stop = start + int(chosen.sum()) * (width - 1)
        rest = _unpack_fixed(bits[start:stop], width - 1)
        sizes[chosen] = (1 << (width - 1)) | rest
        start = stop
    return sizes
