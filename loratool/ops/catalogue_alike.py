"""Which entries of a catalogue are the same, or nearly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from loratool.ops.catalogue_entry import Entry

CRITERIA = {
    "same": "the same values: one file, or equal SHA-256 of the weight files",
    "candidate": "headers and sizes are equal, so that they may hold the same values",
    "near": "the same base, modules, names and shapes, but other values, dtype or scale",
}
"""How sure a group is → what its members have in common."""


@dataclass(frozen=True)
class Group:
    """Entries (by position) that are alike."""

    likeness: str
    members: tuple[int, ...]


def groups(entries: Sequence[Entry]) -> list[Group]:
    """Duplicates, candidates for such, and near-duplicates; an entry can be in one of each.

    Adapters must agree in every module's scale and alpha too, since the same factors at another
    scale are another update. Without content hashes, entries of equal headers are candidates,
    whether or not they are the same.
    """
    whole = [i for i, entry in enumerate(entries) if entry.fingerprint is not None]

    def alike(members: Iterable[int], key: Callable[[Entry], Hashable]) -> list[tuple[int, ...]]:
        found: dict[Hashable, list[int]] = defaultdict(list)
        for index in members:
            found[key(entries[index])].append(index)
        return [tuple(group) for group in found.values() if len(group) > 1]

    result = []
    candidates = alike(whole, lambda e: (e.kind, e.fingerprint, e.scaling))
    first_of: dict[int, int] = {}
    """Entry → the first that is certainly the same."""
    for group in candidates:
        same = alike(group, _content)
        for members in same:
            result.append(Group("same", members))
            first_of |= dict.fromkeys(members, members[0])
        hashed = all(entries[index].content is not None for index in group)
        if not hashed and len({first_of.get(index, index) for index in group}) > 1:
            result.append(Group("candidate", group))
    for group in alike(whole, lambda e: (e.kind, e.base, e.architecture, e.targets, e.layout)):
        described = [entries[index] for index in group]
        headers = {(e.fingerprint, e.scaling) for e in described}
        contents = {e.content for e in described if e.content is not None}
        if len(headers) > 1 or len(contents) > 1:
            result.append(Group("near", group))
    return result


def _content(entry: Entry) -> Hashable:
    """Equal where the values certainly are."""
    return entry.content or entry.same_file
