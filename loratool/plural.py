"""Counts and lists of names, as a person would write them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, what: str, plural: str | None = None) -> str:
    """(1, 'file') → '1 file'; (2, 'file') → '2 files'. plural: where that is not ``what`` and s."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def first_of(names: Sequence[str]) -> str:
    """'a, b, c', or 'a, b, c and 2 more' of five."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
