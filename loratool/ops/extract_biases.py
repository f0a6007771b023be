"""Biases as differences beside their module's factors: PEFT's lora_bias.

PEFT gives every adapted module such a bias, adds it times the module's scale, and has none for
embeddings. So every factorised module must have a bias, embeddings are stored whole, and a bias
whose own matrix ends without factors is stored whole after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratool.adapter import DenseUpdate, LowRankUpdate, ModuleKind, module_of
from loratool.errors import UsageError
from loratool.layouts.pairs import Alignment
from loratool.ops.extract_jobs import ExtractJob, ExtractResult, Treatment
from loratool.ops.extract_report import Status
from loratool.plural import counted

_WITH_BIAS = (ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.CONV)


def as_differences(
    jobs: Sequence[ExtractJob], alignment: Alignment
) -> tuple[list[ExtractJob], tuple[str, ...]]:
    """The jobs with the biases of factorised modules as differences, and what there is to say.

    Raises UsageError naming the factorised modules that have no bias.
    """
    tied = {name for tie in alignment.ties for name in tie.names}
    jobs = [
        replace(job, treatment=Treatment.WHOLE) if _is_factorised_table(job) else job
        for job in jobs
    ]
    factorised = {
        module_of(job.pair.name): job for job in jobs if job.treatment is Treatment.LOW_RANK
    }
    own = {
        module_of(job.pair.name)
        for job in jobs
        if job.pair.kind is ModuleKind.BIAS and job.pair.name not in tied
    }
    without = [
        job.pair.name
        for module, job in factorised.items()
        if module not in own or job.pair.kind not in _WITH_BIAS
    ]
    if without:
        matrices = counted(len(without), "matrix to factorise has", "matrices to factorise have")
        raise UsageError(
            f"--bias lora_bias: {matrices} no bias of their own, and PEFT merges no adapter that "
            "gives them one",
            details=without[:12],
            hint="leave --bias at whole, or these out with --targets, --exclude or "
            "--rank-for PATTERN=whole",
        )
    changed = [
        replace(job, treatment=Treatment.DIFFERENCE)
        if job.treatment is Treatment.WHOLE
        and job.pair.kind is ModuleKind.BIAS
        and module_of(job.pair.name) in factorised
        and job.pair.name not in tied
        else job
        for job in jobs
    ]
    tables = [job.pair.name for job in jobs if job.pair.kind is ModuleKind.EMBEDDING]
    whole = [job.pair.name for job in jobs if job.treatment is Treatment.WHOLE]
    stored = [name for name in tables if name in whole and name not in tied]
    if not stored:
        return changed, ()
    return changed, (
        f"{', '.join(stored)}: stored whole if changed, since PEFT's lora_bias goes with no "
        "update of an embedding",
    )


def _is_factorised_table(job: ExtractJob) -> bool:
    return job.treatment is Treatment.LOW_RANK and job.pair.kind is ModuleKind.EMBEDDING


def settled(results: Sequence[ExtractResult]) -> list[ExtractResult]:
    """Results in which every bias difference has the scale of its module's factors; those of
    modules without factors are stored whole."""
    scales = {
        module_of(result.row.name): result.update.scale
        for result in results
        if isinstance(result.update, LowRankUpdate)
    }
    return [_settled(result, scales.get(module_of(result.row.name))) for result in results]


def _settled(result: ExtractResult, scale: float | None) -> ExtractResult:
    if not isinstance(result.update, DenseUpdate):
        return result
    if scale is None:
        row = replace(result.row, status=Status.WHOLE, relative_error=0.0)
        return replace(result, row=row, update=None)
    return replace(result, update=replace(result.update, scale=scale))
