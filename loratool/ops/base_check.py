"""Is this the base that the adapter was made for? What the adapter records of it, compared."""

from __future__ import annotations

from pathlib import Path

from loratool.adapter import Adapter
from loratool.errors import DisagreementError, MalformedFile
from loratool.ops.sources import Model
from loratool.provenance import REPORT_FILE, fingerprint
from loratool.storage.checkpoint import read_json_file


def check_base(model: Model, path: Path, adapter: Adapter, required: bool) -> list[str]:
    """What speaks against ``model`` being the adapter's base, as notes.

    Compared are the recorded Hub name with the one in the base's config, and the fingerprint in
    the adapter's report with the base's. With ``required``, a difference is a DisagreementError,
    and so is an adapter that records nothing to compare.
    """
    differing, compared = [], 0
    theirs, ours = adapter.base_model, model.config.hub_name
    if theirs and ours:
        compared += 1
        if theirs != ours:
            differing.append(f"it was made for {theirs}, the base's config says {ours}")
    recorded = _recorded_fingerprint(path)
    if recorded is not None:
        compared += 1
        if recorded != fingerprint(model.checkpoint):
            differing.append("the files of the base it was made for had other headers or sizes")
    if required and differing:
        raise DisagreementError(
            f"{path}: is not an adapter of this base",
            details=differing,
            hint="leave out --base-check to merge it all the same",
        )
    if required and not compared:
        raise DisagreementError(
            f"{path}: records nothing that could be compared with this base",
            hint="leave out --base-check to merge it all the same",
        )
    return [f"{path.name}: {what}" for what in differing]


def _recorded_fingerprint(path: Path) -> str | None:
    """The base's fingerprint in the report that extract puts beside an adapter."""
    report = (path if path.is_dir() else path.parent) / REPORT_FILE
    if not report.is_file():
        return None
    try:
        base = read_json_file(report).get("base")
    except MalformedFile:
        return None
    value = base.get("fingerprint") if isinstance(base, dict) else None
    return value if isinstance(value, str) else None
