"""What must be equal for the finished parts of a killed merge to be taken over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratool.ops.merge_inputs import Merging
from loratool.ops.merge_layout import Layout
from loratool.ops.merge_report import MergeRow
from loratool.ops.merge_work import Work
from loratool.provenance import loratool_version


def resume_key(merging: Merging, layout: Layout, side_files: Sequence[Path], link: bool) -> str:
    """A digest of the inputs' names, sizes and times, of all options, and of the version."""
    digest = hashlib.sha256(f"{loratool_version()} {link} {merging.device}".encode())
    for line in values_identity(merging):
        digest.update(line.encode())
    for path in [*merging.base.paths, *side_files]:
        digest.update(_stamp(path).encode())
    for file in layout.files:
        digest.update(file.name.encode() + file.header)
    return digest.hexdigest()


def values_identity(merging: Merging) -> Iterator[str]:
    """What decides the merged values, but for the base: adapters and options, line by line."""
    yield str(merging.asked)
    for one in merging.adapters:
        paths = sorted(one.path.iterdir()) if one.path.is_dir() else [one.path]
        yield from (_stamp(path) for path in paths if path.is_file())
    for name, placed in merging.updates.items():
        for update in placed:
            yield f"{name} {update.describe()} {update.weight.hex()} {update.adapter}"


def split_done(
    work: Sequence[Work], recorded: Mapping[str, Any], intact: set[str]
) -> tuple[list[MergeRow], list[Work]]:
    """Rows that an earlier run recorded, and the work that remains.

    intact: files of which the earlier run's data is there.
    """
    rows, left = [], []
    for item in work:
        if item.key not in recorded or file_of(item.key) not in intact:
            left.append(item)
        elif recorded[item.key] is not None:
            rows.append(MergeRow(**recorded[item.key]))
    return rows, left


def file_of(job: str) -> str:
    """The output file that a recorded job wrote to."""
    return job.rpartition("@")[0]


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}\n"
