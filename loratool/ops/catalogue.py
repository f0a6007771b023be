"""Every adapter and checkpoint below folders: what each is, and which are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loratool.engine import NoProgress, Progress
from loratool.errors import UsageError
from loratool.layouts.families import natural
from loratool.ops.catalogue_alike import CRITERIA, Group, groups
from loratool.ops.catalogue_entry import Entry, content_hash, describe
from loratool.ops.catalogue_finding import Search
from loratool.provenance import document

SCHEMA_VERSION = 1
KINDS = ("adapter", "checkpoint")

ORDERS: dict[str, Callable[[Entry], Any]] = {
    "name": lambda entry: (),
    "kind": lambda entry: entry.kind,
    "format": lambda entry: entry.format.lower(),
    "base": lambda entry: (entry.base or entry.architecture or "~").lower(),
    "rank": lambda entry: -max(entry.ranks, default=0),
    "parameters": lambda entry: -(entry.parameters or 0),
    "size": lambda entry: -entry.size_bytes,
    "date": lambda entry: -entry.modified,
    "health": lambda entry: (entry.health == "ok", entry.health),
}
"""--sort: field → key; numbers and dates with the largest first, what ails before what is well."""


@dataclass(frozen=True)
class CatalogueReport:
    """What was found, in order. notes: what could not be looked into."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    checksum: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        body = {
            "checksum": self.checksum,
            "entries": [entry.to_json() for entry in self.entries],
            "alike": [
                {
                    "likeness": group.likeness,
                    "criterion": CRITERIA[group.likeness],
                    "entries": list(group.members),
                }
                for group in self.groups
            ],
            "notes": list(self.notes),
        }
        return document("list", SCHEMA_VERSION, body)


def list_models(
    roots: Sequence[Path],
    *,
    only: Sequence[str] = (),
    kind: str | None = None,
    sort: str = "name",
    checksum: bool = False,
    progress: Progress | None = None,
) -> CatalogueReport:
    """Read the headers and configs of everything below ``roots``.

    only: globs over names, whole or a part between slashes. checksum: read those whole that may be
    duplicates, to be sure. Raises InputMissing for a root that is not there and UsageError; what
    is wrong with an entry is in its ``health``.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown kind {kind!r}", hint=f"choose {' or '.join(KINDS)}")
    if sort not in ORDERS:
        raise UsageError(f"cannot sort by {sort!r}", hint=f"choose one of {', '.join(ORDERS)}")
    search = Search(roots)
    entries = []
    for found in search:
        if only and not any(_matches(pattern, found.name) for pattern in only):
            continue
        entry = describe(found)
        if kind is None or entry.kind == kind:
            entries.append(entry)
    entries.sort(key=lambda entry: (ORDERS[sort](entry), natural(entry.name)))
    if checksum:
        entries = _with_contents(entries, progress or NoProgress())
    return CatalogueReport(tuple(entries), tuple(groups(entries)), checksum, tuple(_notes(search)))


def _matches(pattern: str, name: str) -> bool:
    return any(
        fnmatchcase(name, form)
        for form in (pattern, f"*/{pattern}", f"{pattern}/*", f"*/{pattern}/*")
    )


def _with_contents(entries: list[Entry], progress: Progress) -> list[Entry]:
    """Content hashes for those that equal headers make candidates."""
    asked = [i for group in groups(entries) if group.likeness == "candidate" for i in group.members]
    progress.start("reading candidates", sum(entries[index].size_bytes for index in asked))
    for index in asked:
        entry = entries[index]
        try:
            entries[index] = replace(entry, content=content_hash(entry))
        except OSError as error:
            entries[index] = replace(
                entry, health="unreadable", error=f"{entry.path}: {error.strerror}"
            )
        progress.advance(entry.size_bytes)
    progress.finish()
    return entries


def _notes(search: Search) -> list[str]:
    notes = [f"{name}: could not be looked into: {why}" for name, why in search.unreadable]
    if search.no_weights:
        notes.append(
            f"passed over, called .bin, .pt or .pth without torch weights: {search.no_weights}"
        )
    return notes
