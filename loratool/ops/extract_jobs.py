"""The work on one tensor of an extraction, as a job that any worker can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from loratool.adapter import DenseUpdate, DoraUpdate, LowRankUpdate, ModuleKind
from loratool.algebra.energies import sum_of_squares
from loratool.algebra.factorize import Factors, factorize, identity_factors, residual_norm
from loratool.algebra.factorize import resolve_spectrum as spectrum_of
from loratool.algebra.lora_test import lora_rank
from loratool.algebra.lowrank import LowRank
from loratool.algebra.ranks import RankRule
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.stacking import at_scale, stacked
from loratool.errors import NonFiniteValues, RangeOverflow
from loratool.layouts.pairs import Pair
from loratool.ops.adapter_folder import load_update, module_factors, stored_value
from loratool.ops.deltas import (
    Delta,
    check_finite_rows,
    matrix_shape,
    measure_delta,
    read_delta,
)
from loratool.ops.extract_dora import dora_value
from loratool.ops.extract_report import Status, TensorRow
from loratool.plural import counted
from loratool.stopwatch import Stopwatch
from loratool.storage.dtypes import DType
from loratool.storage.row_reader import read_ahead as ask_for
from loratool.storage.writing import park


class Treatment(StrEnum):
    """What happens to a tensor if it changed."""

    LOW_RANK = "low-rank"
    WHOLE = "whole"
    NEW_ROWS = "new rows, or whole"
    EXCLUDED = "excluded"
    DIFFERENCE = "difference"
    NO_BUDGET = "no budget"
    NO_PLACE = "no place"


@dataclass(frozen=True)
class Start:
    """An update of a matrix that its extraction continues from.

    transposed: the stored tensor is the update's transpose (Conv1D, embedding).
    """

    source: str
    update: LowRankUpdate
    transposed: bool

    def load(self, device: torch.device) -> LowRank:
        """In the orientation of the stored tensor. Raises NonFiniteValues."""
        value = load_update("--into", self.update, device)
        return value.T if self.transposed else value


@dataclass(frozen=True)
class ExtractJob:
    """One tensor: where it lies on both sides and what to make of its change.

    sketch: see factorize's sketch_dtype. scale: that of the stored update. start: an update to
    continue from (see extract_into). dora: fit a DoRA update.
    """

    index: int
    pair: Pair
    treatment: Treatment
    rule: RankRule
    dtype: DType
    device: torch.device
    seed: int
    exact: bool
    scratch: Path | None
    sketch: torch.dtype | None = None
    scale: float = 1.0
    start: Start | None = None
    dora: bool = False

    @property
    def input_first(self) -> bool:
        """Whether the module's matrix, (out, in), is the transpose of the stored one."""
        kinds = (ModuleKind.EMBEDDING, ModuleKind.CONV1D)
        return self.pair.kind in kinds or self.pair.input_first

    @property
    def cost(self) -> int:
        """Bytes to read."""
        return self.pair.base.nbytes + self.pair.tuned.nbytes

    @property
    def key(self) -> str:
        """What the randomised method's numbers depend on."""
        return f"{self.seed}:{self.pair.name}"

    @property
    def uses_matrix(self) -> bool:
        """Whether the change itself is worked on, not only its size."""
        worked_on = (Treatment.LOW_RANK, Treatment.DIFFERENCE)
        return self.treatment in worked_on or self.start is not None

    @property
    def sketched(self) -> bool:
        """Whether the randomised method gets the change as it was read."""
        as_read = self.start is None and not self.dora
        sketches = not self.exact and self.rule.kind.name != "full"
        return self.treatment is Treatment.LOW_RANK and as_read and sketches

    @property
    def memory_bytes(self) -> int:
        """Working memory of the job: its change in float32, as much again to factorise it, and
        what is left of it where it continues from an update. A DoRA needs both sides too."""
        float32 = 4 * self.pair.base.numel * self.uses_matrix
        copies = 1 + (self.treatment is Treatment.LOW_RANK) + (self.start is not None)
        copies += 3 * self.dora
        return copies * float32

    @property
    def likely_output_bytes(self) -> int:
        """Size of what it stores, if the tensor changed; where the rule looks at the spectrum, at
        the rank that it looks at first."""
        if self.treatment in (Treatment.WHOLE, Treatment.NEW_ROWS):
            return self.pair.whole.nbytes
        if self.treatment is not Treatment.LOW_RANK:
            return 0
        rows, columns = matrix_shape(self.pair.base.shape)
        rank = self.rule.likely((rows, columns)) + (self.start.update.rank if self.start else 0)
        return rank * (rows + columns) * self.dtype.bits // 8


@dataclass(frozen=True)
class ExtractResult:
    """A tensor's row, its update where it has one, and how long its stages took."""

    row: TensorRow
    update: LowRankUpdate | DoraUpdate | DenseUpdate | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


_NOT_STORED = {
    Treatment.EXCLUDED: Status.EXCLUDED,
    Treatment.NO_BUDGET: Status.BELOW_RULE,
    Treatment.NO_PLACE: Status.NO_PLACE,
}


def extract_tensor(job: ExtractJob, stopwatch: Stopwatch | None = None) -> ExtractResult:
    """Compare one tensor and, where that is the plan, factorise and park its change.

    ``stopwatch`` is told the stages read, sketch, orthogonalise, certify and write.
    """
    stopwatch = stopwatch or Stopwatch()
    row = TensorRow(
        name=job.pair.name,
        kind=str(job.pair.kind),
        shape=job.pair.base.shape,
        added_rows=job.pair.added_rows,
        status=Status.UNCHANGED,
    )
    if not job.pair.whole.numel:
        return ExtractResult(row)
    try:
        with stopwatch.stage("read"):
            check_finite_rows(job.pair)
            delta = (
                read_delta(job.pair, job.device, rough=job.sketched)
                if job.uses_matrix
                else measure_delta(job.pair, job.device)
            )
    except (NonFiniteValues, RangeOverflow):
        if job.treatment is not Treatment.EXCLUDED:
            raise
        return ExtractResult(replace(row, status=Status.NOT_MEASURED))
    if delta is None and not job.pair.added_rows:
        return ExtractResult(row)
    if delta is None:
        if job.treatment is Treatment.NEW_ROWS:
            return ExtractResult(replace(row, status=Status.NEW_ROWS, relative_error=0.0))
        return ExtractResult(_stored_or_not(row, job.treatment))
    row = replace(
        row,
        delta_norm=delta.norm,
        base_norm=delta.base_norm,
        noise_floor=delta.noise.threshold,
        noise_share=delta.noise.share_of(delta.energy),
        changed_share=delta.changed_share,
    )
    if job.treatment is Treatment.DIFFERENCE:
        return _difference(job, row, delta)
    if job.treatment is Treatment.LOW_RANK and job.dora:
        return _dora(job, row, delta, stopwatch)
    start = job.start.load(job.device) if job.start else None
    if job.treatment is not Treatment.LOW_RANK and start is None:
        return ExtractResult(_stored_or_not(row, job.treatment))
    rest = delta if start is None else delta.minus(start)
    row, new = _factorised(job, row, rest, stopwatch)
    if start is not None:
        row = replace(row, kept_rank=start.rank, rest_norm=rest.norm)
        value = start if new is None else stacked(start, new)
    elif new is not None:
        value = at_scale(new, job.scale)
    else:
        return ExtractResult(replace(row, status=Status.BELOW_RULE))
    value = stored_value(job.pair.name, value, job.dtype)
    with stopwatch.stage("certify"):
        missed = residual_norm(delta.matrix, value)
    row = replace(
        row,
        status=Status.LOW_RANK,
        rank=value.rank,
        relative_error=missed / delta.norm,
        clamped=new is not None and job.rule.clamps(new.rank),
    )
    with stopwatch.stage("write"):
        return ExtractResult(row, _park(job, value))


def read_ahead(job: ExtractJob) -> None:
    """Ask for the bytes of a job that comes soon."""
    for side in (job.pair.base, job.pair.tuned):
        ask_for(side)


def _factorised(
    job: ExtractJob, row: TensorRow, rest: Delta, stopwatch: Stopwatch
) -> tuple[TensorRow, LowRank | None]:
    """The factors that the rule keeps of ``rest``, None for none, and the row with the findings."""
    if job.treatment is not Treatment.LOW_RANK or rest.energy == 0:
        return row, None
    if job.rule.kind.name == "full":
        row = replace(row, method="exact (W − W0 itself)", excess_bound=0.0, failure=0.0)
        return row, identity_factors(rest.matrix)
    factors = _factors(job, rest, stopwatch)
    row = _with_findings(row, factors, rest)
    if job.start is not None:  # the question is about the whole change
        row = replace(row, lora_rank=None, lora_least=None, lora_tail=None)
    return row, factors.low_rank() if factors.rank else None


def _factors(job: ExtractJob, delta: Delta, stopwatch: Stopwatch) -> Factors:
    return factorize(
        delta.matrix,
        job.rule,
        key=job.key,
        exact=job.exact,
        noise_floor=delta.noise.threshold,
        energy=delta.energy,
        sketch_dtype=job.sketch,
        rough=delta.rough,
        stopwatch=stopwatch,
    )


def _dora(job: ExtractJob, row: TensorRow, delta: Delta, stopwatch: Stopwatch) -> ExtractResult:
    """The change as a DoRA update; its error is that of the merged weight."""

    def factorise(matrix: Tensor) -> Factors:
        other = replace(delta, matrix=matrix, energy=sum_of_squares(matrix), rough=None)
        return _factors(job, other, stopwatch)

    full = job.rule.kind.name == "full"
    found = dora_value(
        job.pair,
        delta.matrix,
        job.dtype,
        None if full else factorise,
        transposed=job.input_first,
    )
    if found is None:
        return ExtractResult(replace(row, status=Status.BELOW_RULE))
    if found.first is None or found.last is None:
        row = replace(row, method="DoRA, exact")
    else:
        row = _with_findings(row, found.first, delta)
        kept = found.last.spectrum.values[: found.last.rank]
        row = replace(
            row,
            method=f"DoRA, {counted(found.sweeps, 'sweep')} of {found.last.method}",
            singular_values=tuple(kept.tolist()),
            excess_bound=None,
            failure=None,
        )
    row = replace(
        row,
        status=Status.LOW_RANK,
        rank=found.value.rank,
        relative_error=found.missed / delta.norm,
        clamped=job.rule.clamps(found.value.rank),
    )
    with stopwatch.stage("write"):
        value = found.value.T if job.input_first else found.value
        return ExtractResult(row, _park(job, value, found.magnitude))


def _difference(job: ExtractJob, row: TensorRow, delta: Delta) -> ExtractResult:
    """A vector's change, divided by the scale that its module multiplies it with."""
    assert job.dtype.torch is not None
    value = (delta.matrix.double() / job.scale).to(job.dtype.torch)
    missed = delta.matrix.double() - value.double() * job.scale
    if not bool(torch.isfinite(value).all()):
        raise RangeOverflow(
            f"{job.pair.name}: the difference exceeds the range of {job.dtype.name}",
            hint="use --dtype float32",
        )
    row = replace(
        row,
        status=Status.DIFFERENCE,
        relative_error=float(torch.linalg.vector_norm(missed)) / delta.norm,
    )
    values = value.reshape(job.pair.base.shape)
    parked = park(parked_file(job), {"value": values})
    return ExtractResult(row, DenseUpdate(parked["value"], job.scale))


def _stored_or_not(row: TensorRow, treatment: Treatment) -> TensorRow:
    if treatment in (Treatment.WHOLE, Treatment.NEW_ROWS):
        return replace(row, status=Status.WHOLE, relative_error=0.0)
    return replace(row, status=_NOT_STORED[treatment])


def resolve_spectrum(job: ExtractJob) -> Spectrum | None:
    """The singular values that the job's rule resolves; None for what has no factors."""
    if job.treatment is not Treatment.LOW_RANK or not job.pair.base.numel:
        return None
    delta = read_delta(job.pair, job.device, rough=job.sketched)
    if delta is None:
        return None
    if job.start is not None:
        delta = delta.minus(job.start.load(job.device))
    return spectrum_of(
        delta.matrix,
        job.rule,
        key=job.key,
        exact=job.exact,
        noise_floor=delta.noise.threshold,
        energy=delta.energy,
        sketch_dtype=job.sketch,
        rough=delta.rough,
    )


def _with_findings(row: TensorRow, factors: Factors, delta: Delta) -> TensorRow:
    answer = lora_rank(factors.spectrum, delta.noise, delta.changed_share)
    return replace(
        row,
        method=factors.method,
        singular_values=tuple(factors.spectrum.values[: factors.rank].tolist()),
        excess_bound=factors.bound.excess,
        failure=factors.bound.failure,
        lora_rank=answer.rank if answer else None,
        lora_least=answer.least if answer else None,
        lora_tail=answer.tail if answer else None,
    )


def _park(
    job: ExtractJob, value: LowRank, magnitude: Tensor | None = None
) -> LowRankUpdate | DoraUpdate:
    """Keep the factors on disk, as PEFT's module wants them.

    (out, r) and (r, in); of a convolution (out, r, 1…) and (r, in, k…). magnitude: (out,).
    """
    if job.input_first:
        value = value.T
    kernel = job.pair.base.shape[1:] if job.pair.kind is ModuleKind.CONV else ()
    b, a = module_factors(value, kernel)
    beside = {} if magnitude is None else {"magnitude": magnitude}
    parked = park(parked_file(job), {"b": b, "a": a, **beside})
    alpha = value.scale * value.rank
    is_embedding = job.pair.kind is ModuleKind.EMBEDDING
    update = LowRankUpdate(parked["b"], parked["a"], alpha / value.rank, alpha, is_embedding)
    return update if magnitude is None else DoraUpdate(update, parked["magnitude"])


def parked_file(job: ExtractJob) -> Path:
    """Where a job's factors lie until all are known."""
    assert job.scratch is not None
    return job.scratch / f"{job.index}.raw"
