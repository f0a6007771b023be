"""Log entries that may be cut short at any byte: each is framed by its lengths and checksum."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

_MAGIC = b"LTJ1"
_FRAME = struct.Struct("<4sIQI")
_MOST = 2**30
"""Bytes of a part; no block is as large."""


def framed(entry: Mapping[str, Any], payload: bytes) -> list[bytes]:
    """The bytes of an entry, in parts."""
    text = json.dumps(dict(entry)).encode()
    checksum = zlib.crc32(payload, zlib.crc32(text))
    return [_FRAME.pack(_MAGIC, len(text), len(payload), checksum), text, payload]


def next_frame(read: Callable[[int], bytes]) -> tuple[dict[str, Any], bytes] | None:
    """An entry and its payload; None at the end, or where it was cut short."""
    head = read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    magic, length, payload_length, checksum = _FRAME.unpack(head)
    if magic != _MAGIC:
        return None
    text = read(min(length, _MOST))
    payload = read(min(payload_length, _MOST))
    whole = len(text) == length and len(payload) == payload_length
    if not whole or zlib.crc32(payload, zlib.crc32(text)) != checksum:
        return None
    entry = json.loads(text)
    return (entry, payload) if isinstance(entry, dict) else None


def has_frame(data: bytes) -> bool:
    """Whether a whole entry begins anywhere in ``data``."""
    at = data.find(_MAGIC)
    while at >= 0:
        if next_frame(io.BytesIO(data[at:]).read) is not None:
            return True
        at = data.find(_MAGIC, at + 1)
    return False
