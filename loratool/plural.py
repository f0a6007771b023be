"""Counted nouns, as a person would write them."""

from __future__ import annotations


def counted(count: int, what: str, plural: str | None = None) -> str:
    """(1, 'file') → '1 file'; (2, 'file') → '2 files'. plural: where that is not ``what`` and s."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"
