"""Is this the base that the adapter was made for? What the adapter records of it, compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from loratool.adapter import Adapter
from loratool.errors import DisagreementError, MalformedFile
from loratool.ops.receipt_match import receipt_beside, recorded_in
from loratool.ops.sources import Model
from loratool.plural import counted
from loratool.provenance import REPORT_FILE, fingerprint
from loratool.storage.checkpoint import read_json_file
from loratool.storage.tensors import LazyTensor, TensorInfo, is_range, read_into

_PIECES, _PIECE_BYTES = 4, 16 * 1024


def samples_of(tensors: Iterable[LazyTensor]) -> dict[str, str]:
    """A sign of each tensor's values, by its stored name: dtype and SHA-256 of 64 KiB spread over
    it. Views and tensors that a pickle does not keep in order have none."""
    plain = (info for info in tensors if is_range(info))
    return {info.name: f"{info.dtype.name}:{_sampled_sha256(info)}" for info in plain}


def _sampled_sha256(info: TensorInfo) -> str:
    size = min(info.nbytes, _PIECE_BYTES)
    last = info.nbytes - size
    digest = hashlib.sha256()
    for start in sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)}):
        part = bytearray(size)
        read_into(info.path, info.offset + start, memoryview(part), what=info.name)
        digest.update(part)
    return digest.hexdigest()


def check_base(
    model: Model, path: Path, adapter: Adapter, *, required: bool, values: bool = True
) -> list[str]:
    """What speaks against ``model`` being the adapter's base, as notes.

    Compared are the recorded Hub name with the one in the base's config, and from the adapter's
    report the fingerprint with the base's and the samples of the tensors that it changes, unless
    ``values`` says that the model holds others than the base's. With ``required``, a difference is
    a DisagreementError, and so is an adapter that records nothing to compare.
    """
    differing, compared = [], 0
    theirs, ours = adapter.base_model, model.config.hub_name
    if theirs and ours:
        compared += 1
        if theirs != ours:
            differing.append(f"it was made for {theirs}, the base's config says {ours}")
    base = _recorded_base(path)
    recorded = base.get("fingerprint")
    if isinstance(recorded, str):
        compared += 1
        if recorded != fingerprint(model.checkpoint):
            differing.append("the files of the base it was made for had other headers or sizes")
    samples = base.get("samples")
    if values and isinstance(samples, dict):
        looked, other = _other_values(model, samples)
        compared += bool(looked)
        if other:
            differing.append(
                f"other values than in the base it was made for in {len(other)} of "
                f"{counted(looked, 'tensor')} that it changes ({', '.join(other[:3])})"
            )
    receipt = receipt_beside(model.checkpoint.path) if values else None
    if receipt is not None and receipt.is_file() and adapter.updates:
        name = recorded_in(receipt, adapter)
        if name is not None:
            differing.append(
                f"is merged into this base already, as {name}, by {receipt.name} in it"
            )
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


def _other_values(model: Model, samples: Mapping[str, object]) -> tuple[int, list[str]]:
    """How many tensors can be compared with the recorded samples, and those that differ."""
    tensors = model.checkpoint.tensors
    known = {
        name: sample
        for name, sample in samples.items()
        if isinstance(sample, str)
        and name in tensors
        and sample.startswith(f"{tensors[name].dtype.name}:")
    }
    found = samples_of(tensors[name] for name in known)
    return len(found), [name for name, sample in found.items() if sample != known[name]]


def _recorded_base(path: Path) -> Mapping[str, object]:
    """What the report that extract puts beside an adapter says of the base."""
    report = (path if path.is_dir() else path.parent) / REPORT_FILE
    if not report.is_file():
        return {}
    try:
        base = read_json_file(report).get("base")
    except MalformedFile:
        return {}
    return base if isinstance(base, dict) else {}
