"""A budget of parameters shared out among the matrices of an extraction.

Ranks are chosen for what shares one: a matrix, the experts of one parameter (PEFT has one rank for
them), or all matrices for a consumer that takes one rank. So what is written for them is what was
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from loratool.adapter import ModuleKind
from loratool.algebra.budget import Allocation, allocate
from loratool.algebra.ranks import parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.errors import NothingMatches
from loratool.formats.peft_experts import parameter_of
from loratool.ops.deltas import matrix_shape
from loratool.ops.extract_jobs import ExtractJob, Treatment
from loratool.plural import counted
from loratool.profiles import Profile, allowed_rank


def spend(
    jobs: Sequence[ExtractJob],
    spectra: Mapping[str, Spectrum],
    parameters: int,
    profile: Profile,
) -> tuple[list[ExtractJob], Allocation]:
    """The jobs at the ranks that the budget gives them. spectra: of all that changed, by tensor.

    Raises NothingMatches where the budget holds no component at all.
    """
    at_most = {job.pair.name: job.rule.first_guess(_shape(job)) for job in jobs if _has_rank(job)}
    spectra = {
        name: replace(spectrum, values=spectrum.values[: at_most[name]])
        for name, spectrum in spectra.items()
    }
    ranks, allocation = shared_out(spectra, stack_sizes(jobs), parameters, profile)
    if spectra and not allocation.used:
        raise NothingMatches(
            f"a budget of {counted(parameters, 'parameter')} holds no component at all",
            hint="raise it; --dry-run=ranks shows what ranks cost and keep",
        )
    return [_at(job, ranks.get(job.pair.name)) for job in jobs], allocation


def stack_sizes(jobs: Sequence[ExtractJob]) -> dict[str, int]:
    """How many matrices the parameters of experts have, unchanged ones too."""
    sizes: dict[str, int] = {}
    for job in jobs:
        if job.pair.kind is ModuleKind.EXPERT:
            stack = parameter_of(job.pair.name)
            sizes[stack] = sizes.get(stack, 0) + 1
    return sizes


def shared_out(
    spectra: Mapping[str, Spectrum], stacks: Mapping[str, int], parameters: int, profile: Profile
) -> tuple[dict[str, int], Allocation]:
    """The rank of each tensor. stacks: see stack_sizes."""
    if profile.limits.one_rank:
        return _one_rank(spectra, parameters, profile)
    groups: dict[str, list[str]] = {}
    for name in spectra:
        groups.setdefault(_group(name, stacks), []).append(name)
    together = [
        _together([spectra[name] for name in names], stacks.get(group, 1))
        for group, names in groups.items()
    ]
    allocation = allocate(together, parameters)
    ranks = {
        name: min(rank, len(spectra[name].values))
        for names, rank in zip(groups.values(), allocation.ranks, strict=True)
        for name in names
    }
    return ranks, allocation


def _one_rank(
    spectra: Mapping[str, Spectrum], parameters: int, profile: Profile
) -> tuple[dict[str, int], Allocation]:
    """All matrices at the largest rank that the profile knows and the budget pays for."""
    cost = sum(sum(spectrum.shape) for spectrum in spectra.values())
    most = max((len(spectrum.values) for spectrum in spectra.values()), default=0)
    if profile.limits.ranks is not None:
        most = min(most, profile.limits.ranks[-1])
    rank = next((r for r in range(most, 0, -1) if allowed_rank(r, profile) * cost <= parameters), 0)
    ranks = {name: min(rank, len(spectrum.values)) for name, spectrum in spectra.items()}
    used = allowed_rank(rank, profile) * cost if rank else 0
    return ranks, Allocation(tuple(ranks.values()), used, 0.0)


def parameters_at(
    rank: int, spectra: Mapping[str, Spectrum], stacks: Mapping[str, int], profile: Profile
) -> int:
    """What all tensors take at one rank, what is padded counted. Raises Unplaced."""
    if not spectra:
        return 0
    if profile.limits.one_rank:
        most = max(len(spectrum.values) for spectrum in spectra.values())
        padded = allowed_rank(min(rank, most), profile)
        return sum(padded * sum(spectrum.shape) for spectrum in spectra.values())
    costs = {
        _group(name, stacks): min(rank, len(spectrum.values)) * sum(spectrum.shape)
        for name, spectrum in spectra.items()
    }
    return sum(cost * stacks.get(group, 1) for group, cost in costs.items())


def _group(name: str, stacks: Mapping[str, int]) -> str:
    """The parameter of an expert, whose matrices share a rank; else the tensor itself."""
    stack = parameter_of(name)
    return stack if stack in stacks else name


def _together(spectra: Sequence[Spectrum], count: int) -> Spectrum:
    """What one rank for ``count`` matrices keeps and costs; spectra: of those that changed."""
    if count == 1:
        return spectra[0]
    energies = torch.zeros(max(len(spectrum.values) for spectrum in spectra), dtype=torch.float64)
    for spectrum in spectra:
        energies[: len(spectrum.values)] += spectrum.values.square()
    rows, columns = spectra[0].shape
    total = sum(spectrum.total_energy for spectrum in spectra)
    return Spectrum(energies.sqrt(), total, (count * rows, count * columns))


def _at(job: ExtractJob, rank: int | None) -> ExtractJob:
    if rank is None:
        return job
    if rank == 0:
        return replace(job, treatment=Treatment.NO_BUDGET)
    return replace(job, rule=parse_rank_rule(str(rank)))


def _has_rank(job: ExtractJob) -> bool:
    return job.treatment is Treatment.LOW_RANK


def _shape(job: ExtractJob) -> tuple[int, int]:
    return matrix_shape(job.pair.base.shape)
