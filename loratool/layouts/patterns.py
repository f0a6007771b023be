"""Choosing parameters by pattern, as --include and --exclude do.

A pattern is a shell glob over dotted names. It need not name the whole parameter: ``c_attn``,
``mlp.c_fc``, ``h.0`` and ``*.mlp.*`` all work, on whole dotted components.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from loratool.errors import NothingMatches
from loratool.layouts.names import near_misses


def matches(pattern: str, name: str) -> bool:
    """Whether the glob covers the name or a run of its dotted components."""
    return any(
        fnmatchcase(name, form)
        for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def select(names: Collection[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Names that some include pattern covers (all, when there is none) and no exclude does.

    Raises NothingMatches for a pattern that covers no name at all: it is a slip of the pen.
    """
    for pattern in (*include, *exclude):
        if not any(matches(pattern, name) for name in names):
            raise NothingMatches(
                f"pattern {pattern!r} matches nothing",
                details=[f"closest: {name}" for name in near_misses(pattern, names)],
                hint="patterns are globs over dotted names, e.g. 'c_attn', 'h.0.*', '*.mlp.*'",
            )
    return {
        name
        for name in names
        if (not include or any(matches(pattern, name) for pattern in include))
        and not any(matches(pattern, name) for pattern in exclude)
    }
