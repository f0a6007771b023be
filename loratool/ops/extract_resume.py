"""Finished tensors of an extraction, kept beside their factors so that a killed run can go on.

Nothing is flushed, since a worker would wait for the disk after every tensor: a record holds the
digest of its factors' file, and what a crash of the machine left incomplete is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratool.adapter import DenseUpdate, DoraUpdate, LowRankUpdate, Update
from loratool.layouts.config import ModelConfig
from loratool.ops.extract_jobs import ExtractJob, ExtractResult, parked_file
from loratool.ops.extract_report import Status, TensorRow
from loratool.provenance import loratool_version
from loratool.storage.dtypes import BY_NAME
from loratool.storage.hashing import sha256_of
from loratool.storage.tensors import LazyTensor, TensorInfo
from loratool.storage.views import files_of


def resume_key(
    jobs: Sequence[ExtractJob], into: Path | None = None, configs: Sequence[ModelConfig] = ()
) -> str:
    """What must be equal for finished tensors to be taken over: inputs, options, version.

    into: the adapter that is continued from, a file or a folder. configs: of base and tuned, for
    they decide which rows of a fused matrix are whose.
    """
    files = sorted(
        {
            path
            for job in jobs
            for side in (job.pair.base, job.pair.whole)
            for path in files_of(side)
        }
    )
    state = [loratool_version(), *(json.dumps(c.values, sort_keys=True) for c in configs)]
    if into is not None:
        files += sorted(into.iterdir()) if into.is_dir() else [into]
    for path in files:
        stat = path.stat()
        state.append(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    for job in jobs:
        options = (
            job.rule,
            job.rule.limits,
            job.dtype.name,
            job.device,
            job.seed,
            job.exact,
            job.sketch,
            job.dora,
            job.pair.kind,
            job.scale.hex(),
            job.start.update.scale.hex() if job.start else None,
        )
        state.append(f"{job.pair.name}:{job.treatment}:{':'.join(map(str, options))}")
    return hashlib.sha256("\n".join(state).encode()).hexdigest()


def keep(job: ExtractJob, result: ExtractResult) -> None:
    """Record a finished tensor. The record appears whole, after the factors it speaks of."""
    record = {
        "row": asdict(result.row),
        "update": _described(result.update),
        "sha256": None if result.update is None else _digest(job),
    }
    path = _record(job)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record), encoding="utf-8")
    os.replace(partial, path)


def recall(job: ExtractJob) -> ExtractResult | None:
    """What an earlier run recorded of this tensor, if it did and its factors are intact."""
    try:
        record = json.loads(_record(job).read_text(encoding="utf-8"))
        if record["update"] is not None and record["sha256"] != _digest(job):
            return None
    except (FileNotFoundError, ValueError):
        return None
    row = record["row"]
    row["status"] = Status(row["status"])
    for field in ("shape", "singular_values"):
        row[field] = tuple(row[field])
    update = None if record["update"] is None else _update(job, record["update"])
    return ExtractResult(TensorRow(**row), update)


def _digest(job: ExtractJob) -> str:
    return sha256_of(parked_file(job)).hex()


def _described(update: Update | None) -> dict[str, object] | None:
    if isinstance(update, DenseUpdate):
        return {"value": _place(update.value), "scale": update.scale.hex()}
    if isinstance(update, DoraUpdate):
        magnitude = {"magnitude": _place(update.magnitude)}
        return (_described(update.low_rank) or {}) | magnitude
    if isinstance(update, LowRankUpdate):
        return {
            "b": _place(update.b),
            "a": _place(update.a),
            "scale": update.scale.hex(),
            "alpha": update.alpha.hex(),
            "is_embedding": update.is_embedding,
        }
    return None


def _update(job: ExtractJob, stored: dict[str, Any]) -> LowRankUpdate | DoraUpdate | DenseUpdate:
    scale = float.fromhex(stored["scale"])
    if "value" in stored:
        return DenseUpdate(_tensor(job, stored["value"]), scale)
    update = LowRankUpdate(
        _tensor(job, stored["b"]),
        _tensor(job, stored["a"]),
        scale,
        float.fromhex(stored["alpha"]),
        stored["is_embedding"],
    )
    if "magnitude" in stored:
        return DoraUpdate(update, _tensor(job, stored["magnitude"]))
    return update


def pending(jobs: Sequence[ExtractJob]) -> tuple[dict[int, ExtractResult], list[ExtractJob]]:
    """Results that an earlier run left, by job index, and the jobs that remain."""
    done = {job.index: result for job in jobs if (result := recall(job)) is not None}
    return done, [job for job in jobs if job.index not in done]


def _record(job: ExtractJob) -> Path:
    assert job.scratch is not None
    return job.scratch / f"{job.index}.json"


def _place(tensor: LazyTensor) -> dict[str, object]:
    assert isinstance(tensor, TensorInfo)
    return {
        "name": tensor.name,
        "file": tensor.path.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "nbytes": tensor.nbytes,
    }


def _tensor(job: ExtractJob, place: dict[str, object]) -> TensorInfo:
    assert job.scratch is not None
    return TensorInfo(
        str(place["name"]),
        BY_NAME[str(place["dtype"])],
        tuple(place["shape"]),  # type: ignore[arg-type]
        job.scratch / str(place["file"]),
        int(place["offset"]),  # type: ignore[call-overload]
        int(place["nbytes"]),  # type: ignore[call-overload]
    )
