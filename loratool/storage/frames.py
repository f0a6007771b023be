"""Log entries that may be cut short at any byte: each is framed by its lengths and checksum."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

_MAGIC = b"LTJ1"
_FRAME = struct.Struct("<4sIQI")


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
    text = read(length)
    payload = read(payload_length)
    whole = len(text) == length and len(payload) == payload_length
    if not whole or zlib.crc32(payload, zlib.crc32(text)) != checksum:
        return None
    return json.loads(text), payload
