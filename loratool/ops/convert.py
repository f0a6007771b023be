"""An adapter in another form: in another format, or from a start that was not zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import Adapter, LowRankUpdate, Replacement, Update
from loratool.algebra.lowrank import LowRank
from loratool.algebra.stacking import stacked
from loratool.errors import DisagreementError, Unplaced, UsageError
from loratool.formats.written import DEFAULT, WrittenFormat, find_format
from loratool.layouts.config import is_hub_id
from loratool.ops.adapter_folder import load_update, park_update, stored_value, write_encoded
from loratool.ops.extract_adapter import stored_size
from loratool.ops.sources import open_adapter
from loratool.plural import counted
from loratool.provenance import REPORT_FILE, document
from loratool.storage.checkpoint import read_json_file
from loratool.storage.dtypes import F32
from loratool.storage.outputs import check_free_space, check_output, staged
from loratool.storage.tensors import equal_values

SCHEMA_VERSION = 1
FUSED = ("q", "k", "v")


@dataclass(frozen=True)
class ConvertPlan:
    """Everything decided before a tensor is read."""

    path: Path
    adapter: Adapter
    start: Adapter | None
    start_path: Path | None
    output: Path
    format: WrittenFormat
    overwrite: bool

    @property
    def adapter_bytes(self) -> int:
        """About what is written."""
        return (2 if self.start else 1) * stored_size(self.adapter)[1]

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": self.path.resolve().name,
            "from": self.adapter.format,
            "to": self.format.label,
            "start": self.start_path.resolve().name if self.start_path else None,
            "base_model": self.adapter.base_model,
            "updates": [
                {"name": name, "update": update.describe()}
                for name, update in self.adapter.updates.items()
            ],
        }


@dataclass(frozen=True)
class ConvertReport:
    """What was written. facts: what the plan knew."""

    updates: tuple[tuple[str, str], ...]
    parameters: int
    nbytes: int
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return document(
            "convert",
            SCHEMA_VERSION,
            {
                **self.facts,
                "notes": list(self.notes),
                "totals": {
                    "updates": len(self.updates),
                    "parameters": self.parameters,
                    "bytes": self.nbytes,
                },
                "updates": [{"name": name, "update": text} for name, text in self.updates],
            },
        )


def plan_convert(
    adapter: Path,
    output: Path,
    *,
    alpha: float | None = None,
    fused_parts: str | None = None,
    start: Path | None = None,
    base_model: str | None = None,
    format: str = DEFAULT,
    overwrite: bool = False,
) -> ConvertPlan:
    """Read headers. Nothing is written.

    fused_parts: which of q, k and v a fused module of the LoRA authors' library adapts ("q,v").
    start: the adapter that training began with, for a base from which it was taken out; the
    result is then for the original base, which it names if the start or its report does. format:
    of the result. Raises InputError, DisagreementError, Unplaced, UsageError, OutputError.
    """
    written = find_format(format)
    inputs = [adapter, *([start] if start else [])]
    check_output(output, overwrite=overwrite, inputs=inputs)
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(f"--base-model {base_model!r} is not of the form owner/name")
    value = open_adapter(adapter, alpha, _parts(fused_parts))
    began = open_adapter(start) if start else None
    if start is not None and began is not None:
        _check_start(adapter, value, began)
        # training names the base without the start, which the result is not for
        value = replace(value, base_model=began.base_model or _base_in_report(start))
    value = replace(value, base_model=base_model or value.base_model)
    plan = ConvertPlan(adapter, value, began, start, output, written, overwrite)
    written.encode(value)  # what cannot be stored is said before anything is done
    check_free_space(output, 2 * plan.adapter_bytes)
    return plan


def run_convert(plan: ConvertPlan) -> ConvertReport:
    """Write the adapter folder.

    Raises NonFiniteValues, RangeOverflow, and DisagreementError for parameters beside the
    low-rank updates that training changed and a start cannot explain.
    """
    with staged(plan.output) as staging:
        adapter = plan.adapter
        if plan.start is not None:
            adapter = _without_start(plan, plan.start, staging.scratch)
        encoded = plan.format.encode(adapter)
        count, nbytes = stored_size(adapter)
        report = ConvertReport(
            tuple((name, update.describe()) for name, update in adapter.updates.items()),
            count,
            nbytes,
            {key: value for key, value in plan.to_json().items() if key != "updates"},
            encoded.notes,
        )
        write_encoded(staging.out, encoded, report.to_json())
        staging.publish(overwrite=plan.overwrite)
    return report


def _without_start(plan: ConvertPlan, start: Adapter, scratch: Path) -> Adapter:
    """s·B·A − s·B₀·A₀ for every module: of twice the rank, exact, since factors are only put side
    by side. Parameters stored whole stay as training left them."""
    updates: dict[str, Update] = {}
    for index, (name, update) in enumerate(plan.adapter.updates.items()):
        if not isinstance(update, LowRankUpdate):
            updates[name] = update
            continue
        began = start.updates[name]
        assert isinstance(began, LowRankUpdate)
        device = torch.device("cpu")
        now = load_update(str(plan.path), update, device)
        before = load_update(str(plan.start_path), began, device)
        both = stacked(now, LowRank(-before.b, before.a, before.scale))
        updates[name] = park_update(
            scratch / f"{index}.raw", stored_value(name, both, F32), like=update
        )
    return replace(plan.adapter, updates=updates)


def _base_in_report(start: Path) -> str | None:
    """What ``init`` reports of the base that it took the start out of."""
    report = (start if start.is_dir() else start.parent) / REPORT_FILE
    named = read_json_file(report).get("base_model") if report.is_file() else None
    return named if isinstance(named, str) and is_hub_id(named) else None


def _parts(text: str | None) -> tuple[bool, ...]:
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not words or not set(words) <= set(FUSED) or len(set(words)) != len(words):
        raise UsageError(f"--fused-parts {text!r}: needs some of q, k, v", hint="for example q,v")
    return tuple(part in words for part in FUSED)


def _check_start(path: Path, adapter: Adapter, start: Adapter) -> None:
    for name, update in adapter.updates.items():
        if isinstance(update, Replacement):
            continue
        if not isinstance(update, LowRankUpdate):
            raise Unplaced(
                f"{path}: {name}: {update.describe()}; only plain low-rank updates can have their "
                "start taken off"
            )
        began = start.updates.get(name)
        if not isinstance(began, LowRankUpdate) or began.shape != update.shape:
            raise DisagreementError(
                f"{name}: the start has no low-rank update of shape {list(update.shape)} for it",
                hint="is it the adapter that this training began with?",
            )
    extra = [name for name in start.updates if name not in adapter.updates]
    if extra:
        raise DisagreementError(
            f"the start changes {counted(len(extra), 'parameter')} that the adapter does not",
            details=extra[:12],
            hint="is it the adapter that this training began with?",
        )
    pairs = [
        (update, began)
        for name, update in adapter.low_rank.items()
        for began in [start.updates[name]]
        if isinstance(began, LowRankUpdate)
    ]
    if pairs and all(
        equal_values(now.b, then.b) and equal_values(now.a, then.a) for now, then in pairs
    ):
        raise DisagreementError(
            "adapter and start hold the same factors: nothing was trained, or the wrong one given"
        )
