"""How deep to look."""

from __future__ import annotations

from enum import StrEnum

SCHEMA_VERSION = 1
"""Of the documents of inspect."""


class Level(StrEnum):
    """headers: no tensor's bytes are read. values: one pass over them. spectra: singular values."""

    HEADERS = "headers"
    VALUES = "values"
    SPECTRA = "spectra"
