"""The way back from changed bytes to the original ones, small where values changed little.

Elements are read as unsigned integers. Neighbouring floats are neighbouring integers, so the
difference of a value and its slightly changed self is a small integer; its bytes are stored plane
by plane, where the upper planes are nearly all zero, and deflated.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_LEVEL = 1
_PIECE_BYTES = 2**22
_LENGTH = struct.Struct("<Q")


def pack_difference(original: bytes, changed: bytes, width: int) -> bytes:
    """What ``unpack_difference`` needs to get ``original`` from ``changed``.

    width: of an element in bytes (1, 2, 4 or 8); both are whole elements of one number.
    """
    packed = []
    for start in range(0, len(original), _PIECE_BYTES):
        part = slice(start, start + _PIECE_BYTES)
        piece = _pack(original[part], changed[part], width)
        packed += [_LENGTH.pack(len(piece)), piece]
    return b"".join(packed)


def unpack_difference(packed: bytes, changed: bytes, width: int) -> bytes:
    """The original bytes."""
    original, position = [], 0
    for start in range(0, len(changed), _PIECE_BYTES):
        (length,) = _LENGTH.unpack_from(packed, position)
        position += _LENGTH.size
        piece = packed[position : position + length]
        original.append(_unpack(piece, changed[start : start + _PIECE_BYTES], width))
        position += length
    return b"".join(original)


def _pack(original: bytes, changed: bytes, width: int) -> bytes:
    kind = np.dtype(f"<u{width}")
    step = np.frombuffer(original, kind) - np.frombuffer(changed, kind)
    sign = (step.view(f"<i{width}") >> np.int8(8 * width - 1)).view(kind)
    zigzag = (step << np.uint8(1)) ^ sign
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, width).T)
    packer = zlib.compressobj(_LEVEL, strategy=zlib.Z_RLE)
    return packer.compress(planes.data) + packer.flush()


def _unpack(packed: bytes, changed: bytes, width: int) -> bytes:
    kind = np.dtype(f"<u{width}")
    planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(width, -1)
    zigzag = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
    sign = np.negative(zigzag & kind.type(1))
    original: bytes = (np.frombuffer(changed, kind) + ((zigzag >> np.uint8(1)) ^ sign)).tobytes()
    return original
