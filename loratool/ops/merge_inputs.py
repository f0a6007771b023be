"""What a merge puts into what: the base, the adapters with their weights, and where each goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loratool.adapter import (
    Adapter,
    KasaUpdate,
    LowRankUpdate,
    Replacement,
    TokenRows,
    module_of,
)
from loratool.algebra.rounding import MERGEABLE
from loratool.engine.devices import resolve_device
from loratool.errors import DisagreementError, UnsupportedInput, UsageError
from loratool.layouts.patterns import select
from loratool.layouts.placing import PlacedUpdate, Placement, TieChoice, describe, place
from loratool.layouts.scales import ScaledBy
from loratool.ops.base_check import check_base
from loratool.ops.eight_bits import scales_of
from loratool.ops.merge_jobs import BLOCK_ELEMENTS, NOTHING_MORE, WAITING, Asked
from loratool.ops.merge_layout import Added
from loratool.ops.sources import Model, open_adapters
from loratool.plural import counted
from loratool.storage.dtypes import DType
from loratool.storage.tensors import TensorInfo, equal_values
from loratool.storage.views import Zeros

IN_FLOAT64 = 150
"""Bytes for each value of a block that is calculated in float64: every kind but low-rank ones."""


IN_FLOAT32, _BY_FLOAT64 = 22, 48
"""Bytes that deciding a plain update takes for each weight of a block, by the level it starts at:
the estimate, its bounds, what they round to, and the weights themselves."""
_PER_THREAD = 10 * 2**20
"""What a thread keeps: the buffer that writes go through, factor entries gathered."""


def working_memory(each: int, more: int, workers: int) -> int:
    """Bytes of blocks with ``each`` of them for a weight, and ``more``, for every worker."""
    return (workers + WAITING) * (each * BLOCK_ELEMENTS + _PER_THREAD + more)


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and what the user multiplies its updates with."""

    path: Path
    weight: float
    adapter: Adapter


@dataclass(frozen=True)
class Merging:
    """Everything decided about the values before a weight is read."""

    base: Model
    adapters: tuple[WeightedAdapter, ...]
    scale: float
    device: torch.device
    placement: Placement
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    asked: Asked = NOTHING_MORE
    scaled: Mapping[str, ScaledBy] = field(default_factory=dict)

    @property
    def updates(self) -> dict[str, tuple[PlacedUpdate, ...]]:
        """All updates by the name of the output's tensor."""
        return self.placement.updates | self.placement.added

    @property
    def added(self) -> dict[str, Added]:
        """Tensors that the output has and the base has not."""
        return added_by(self.placement, self.base.checkpoint.tensors)

    @property
    def changed_bytes(self) -> int:
        """Size of the tensors that change, in the base's dtypes."""
        tensors, added = self.base.checkpoint.tensors, self.added
        return sum(
            (tensors[name] if name in tensors else added[name].source).nbytes
            for name in self.updates
        )

    @property
    def changed_weights(self) -> int:
        """How many weights the base's tensors that change have."""
        tensors = self.base.checkpoint.tensors
        return sum(tensors[name].numel for name in self.placement.updates if name in tensors)

    def peak_bytes(self, workers: int) -> int:
        """Working memory: blocks in float32, or float64, beside the factors, per worker."""
        factors = [
            sum(
                sum(4 * math.prod(t.shape) for t in update.update.tensors)
                for update in placed
                if not isinstance(update.update, Replacement | TokenRows)
            )
            for placed in self.updates.values()
        ]
        plain = all(
            isinstance(update.update, LowRankUpdate | Replacement | TokenRows)
            for placed in self.updates.values()
            for update in placed
        )
        each = IN_FLOAT32 if plain and self._is_16_bit() else _BY_FLOAT64 if plain else IN_FLOAT64
        more = 4 * max(factors, default=0) + self._for_kasa()
        return working_memory(each, more, workers)

    def _for_kasa(self) -> int:
        """What a KaSA takes: the whole weight, its Gram matrix and that one's eigenvectors."""
        tensors = self.base.checkpoint.tensors
        return max(
            (
                tensors[name].nbytes + 4 * 8 * min(tensors[name].shape) ** 2
                for name, placed in self.placement.updates.items()
                if _is_kasa(placed)
            ),
            default=0,
        )

    def _is_16_bit(self) -> bool:
        """Whether float32 decides most weights: no changed tensor is wider than 16 bits."""
        tensors = self.base.checkpoint.tensors
        return all(tensors[name].dtype.bits <= 16 for name in self.updates if name in tensors)

    def to_json(self, workers: int) -> dict[str, Any]:
        """What a plan says of the values."""
        return {
            "changed_bytes": self.changed_bytes,
            "peak_bytes": self.peak_bytes(workers),
            "device": str(self.device),
            "scale": self.scale,
            "adapters": [one | {"adapter": str(a.path)} for one, a in self._described()],
            "tensors": [
                {"name": name, "update": describe(placed)} for name, placed in self.updates.items()
            ],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    def facts(self) -> dict[str, Any]:
        """What the report repeats of the plan."""
        first = self.adapters[0]
        return {
            "base": self.base.checkpoint.path.resolve().name,
            "adapter": first.path.resolve().name,
            "adapter_format": first.adapter.format,
            "adapters": [one | {"adapter": a.path.resolve().name} for one, a in self._described()],
            "scale": self.scale,
            "device": str(self.device),
            "tensors_total": len(self.base.checkpoint),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }

    def _described(self) -> list[tuple[dict[str, Any], WeightedAdapter]]:
        return [({"weight": a.weight, "format": a.adapter.format}, a) for a in self.adapters]


def plan_merging(
    model: Model,
    adapters: Sequence[tuple[Path, float]],
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    device: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    base_check: bool = False,
    add_bias: bool = False,
    ties: TieChoice = TieChoice.REFUSE,
    asked: Asked = NOTHING_MORE,
    grow: bool = False,
    allow_lossy: bool = False,
    holds_base: bool = True,
) -> Merging:
    """Read the adapters' headers and place every update.

    ``scale`` multiplies every weight. ``base_check`` makes it an error when what an adapter
    records of its base is not this base. add_bias, ties, grow: see ``place``. holds_base: whether
    the model's values are the base's, and not only its form. Raises InputError,
    DisagreementError or UsageError.
    """
    target = resolve_device(device)
    if not adapters:
        raise UsageError("no adapter is named")
    values = open_adapters([path for path, _ in adapters], alpha)
    opened = [
        WeightedAdapter(path, weight, value)
        for (path, weight), value in zip(adapters, values, strict=True)
    ]
    notes = [
        note
        for one in opened
        for note in check_base(model, one.path, one.adapter, required=base_check, values=holds_base)
    ]
    notes += [
        f"{one.path.name}: its config {what}, of which the file holds nothing"
        for one in opened
        for what in one.adapter.lacking
    ]
    paths = [one.path.resolve() for one in opened]
    notes += [
        f"{path.name} is given {paths.count(path)} times: its update is added as often"
        for path in dict.fromkeys(paths)
        if paths.count(path) > 1
    ]
    chosen, left_out = chosen_of([one.adapter for one in opened], include, exclude)
    opened = [replace(one, adapter=part) for one, part in zip(opened, chosen, strict=True)]
    _check_scale(scale, opened)
    placement = place(
        [(one.adapter, one.weight * scale) for one in opened],
        model.checkpoint.tensors,
        model.config,
        add_bias=add_bias,
        ties=ties,
        grow=grow,
    )
    if placement.added:
        notes.append(
            f"{counted(len(placement.added), 'bias is', 'biases are')} added that the base has "
            "not: a model class that has none there would ignore them (attention_bias in "
            "config.json, for example)"
        )
    kasa = [name for name, placed in placement.updates.items() if _is_kasa(placed)]
    if kasa:
        notes.append(
            f"KaSA leaves out the smallest singular components of {counted(len(kasa), 'weight')}; "
            "they come from float64 eigenvectors, whose last bits may differ between machines"
        )
    scaled = scales_of(placement.updates, model, lossy=allow_lossy)
    _check_dtypes(placement, model, scaled)
    return Merging(
        model,
        tuple(opened),
        scale,
        target,
        placement,
        left_out,
        (*notes, *placement.notes),
        asked,
        scaled,
    )


def added_by(placement: Placement, tensors: Mapping[str, TensorInfo]) -> dict[str, Added]:
    """Tensors that a placement adds to those of a base, and what they start from."""
    added = {}
    for name, main in placement.untied.items():
        added[name] = Added(tensors[main], tensors[main].path)
    for name, placed in placement.added.items():
        weight = tensors[f"{module_of(name)}.weight"]
        shape = placed[0].update.shape
        added[name] = Added(Zeros(weight.dtype, shape), weight.path)
    return added


def check_base_copies(merging: Merging) -> None:
    """Compare base weights that an adapter carries along with the base's. Reads their values.

    Raises DisagreementError.
    """
    for ours, copies in merging.placement.base_copies.items():
        info = merging.base.checkpoint.tensors[ours]
        for copy in copies:
            if info.shape != copy.shape:
                raise DisagreementError(
                    f"{ours}: the adapter was trained on a base with shape {list(copy.shape)}, "
                    f"this one has {list(info.shape)}",
                    hint="a resized vocabulary? use the base that the adapter was trained on",
                )
            if not equal_values(info, copy):
                raise DisagreementError(
                    f"{ours}: the base weights inside the adapter differ from this base's",
                    hint="use the base that the adapter was trained on",
                )


def chosen_of(
    adapters: Sequence[Adapter], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Adapter], tuple[str, ...]]:
    """The adapters with those of their updates that --include and --exclude leave, and the names
    of the others. Raises NothingMatches for a pattern that covers none."""
    names = {name: None for one in adapters for name in one.updates}
    chosen = select(list(names), include, exclude)
    parts = [
        replace(one, updates={n: u for n, u in one.updates.items() if n in chosen})
        for one in adapters
    ]
    return parts, tuple(name for name in names if name not in chosen)


def _check_scale(scale: float, adapters: Sequence[WeightedAdapter]) -> None:
    replaced = [name for one in adapters for name in one.adapter.replacements]
    if scale != 1.0 and replaced:
        raise UsageError(
            f"--scale {scale:g} does not apply to parameters that the adapter replaces",
            details=replaced[:12],
            hint="leave them out with --exclude, or merge at scale 1",
        )


def _is_kasa(placed: Sequence[PlacedUpdate]) -> bool:
    return isinstance(placed[0].update, KasaUpdate)


def _check_dtypes(placement: Placement, model: Model, scaled: Mapping[str, ScaledBy]) -> None:
    for name, placed in placement.updates.items():
        if name in scaled:
            continue
        dtype = model.checkpoint.tensors[placement.untied.get(name, name)].dtype
        calculated = any(not isinstance(update.update, Replacement) for update in placed)
        if calculated and dtype.torch not in MERGEABLE:
            raise UnsupportedInput(
                f"{name}: is stored as {dtype.name}; merging works on F32, F16 and BF16",
                hint="quantised and 64-bit weights must be converted first",
            )
        for update in placed:
            _check_replaces(name, dtype, update)


def _check_replaces(name: str, stored: DType, update: PlacedUpdate) -> None:
    """Replaced values must be of the base's kind: numbers with a fraction do not fit integers."""
    if not isinstance(update.update, Replacement | TokenRows):
        return
    new = update.update.value.dtype
    if new != stored and not (new.is_float and stored.is_float):
        raise DisagreementError(
            f"{name}: the base stores {stored.name}, the adapter replaces it by {new.name}",
            details=[f"in the adapter: {update.source}"] if update.source != name else [],
            hint=f"leave it out with --exclude {update.source}",
        )
