"""A record of finished work that a killed run leaves to the next.

One line per finished job, with its checksum: a line that a kill cut short is passed over. The
caller flushes a job's data to the disk before the job is recorded, so what the log says can be
relied on.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loratool.storage.disk import sync_folder

Record = Mapping[str, Any]


def read_done(path: Path) -> dict[str, Any]:
    """What the log at ``path`` records, by job; nothing where there is no log."""
    if not path.exists():
        return {}
    done: dict[str, Any] = {}
    for line in path.read_bytes().splitlines():
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            continue
        job, result = json.loads(text)
        done[job] = result
    return done


def forget_done(path: Path, jobs: Collection[str]) -> None:
    """Take jobs out of the log, on the disk when this returns."""
    if not jobs:
        return
    kept = {job: result for job, result in read_done(path).items() if job not in jobs}
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    append_done(new, kept)
    os.replace(new, path)
    sync_folder(path.parent)


def append_done(path: Path, records: Record) -> None:
    """Add finished jobs to the log, on the disk when this returns."""
    lines = []
    for job, result in records.items():
        text = json.dumps([job, result]).encode()
        lines.append(b"\n%08x %s" % (zlib.crc32(text), text))
    with open(path, "ab") as file:
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
