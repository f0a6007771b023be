"""How deep to look."""

from __future__ import annotations

from enum import StrEnum

from loratool.errors import UsageError

SCHEMA_VERSION = 1
"""Of the documents of inspect."""


class Level(StrEnum):
    """headers: no tensor's bytes are read. values: one pass over them. spectra: singular values."""

    HEADERS = "headers"
    VALUES = "values"
    SPECTRA = "spectra"


def parse_level(text: str | None, default: Level) -> Level:
    """The level that the user named. Raises UsageError."""
    if text is None:
        return default
    if text not in set(Level):
        raise UsageError(f"unknown level {text!r}", hint=f"choose {', '.join(Level)}")
    return Level(text)
