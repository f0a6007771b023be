"""Where a result came from: versions, fingerprints of inputs, and the shape of every report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this module is needed for error documents, which must not load torch
    from loratool.storage.checkpoint import Checkpoint, WeightFile

REPORT_FILE = "loratool_report.json"


def loratool_version() -> str:
    """The installed package's version."""
    try:
        return version("loratool")
    except PackageNotFoundError:
        return "unknown"


def fingerprint(checkpoint: Checkpoint) -> str:
    """A cheap identity of a checkpoint: SHA-256 over headers and file sizes, not over weights.

    Two checkpoints with equal layout and different values share it, hence its label.
    """
    return fingerprint_of(checkpoint.files)


def fingerprint_of(files: Iterable[WeightFile]) -> str:
    """What ``fingerprint`` is of a checkpoint's files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.raw_header or _description(file))
        digest.update(str(file.path.stat().st_size).encode())
    return f"headers-sha256:{digest.hexdigest()}"


def _description(file: WeightFile) -> bytes:
    rows = [(info.name, info.dtype.name, info.shape) for info in file.tensors.values()]
    return json.dumps(rows).encode()


def document(command: str, schema_version: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """A report as JSON: ``schema`` says which fields to expect, whatever loratool's version.

    NaN and infinities, which JSON lacks, are null.
    """
    return {
        "schema": f"loratool/{command}/{schema_version}",
        "command": command,
        "version": loratool_version(),
        **{name: _storable(value) for name, value in body.items()},
    }


def _storable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _storable(part) for name, part in value.items()}
    return [_storable(part) for part in value] if isinstance(value, list | tuple) else value
