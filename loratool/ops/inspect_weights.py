"""Spectra of a checkpoint's weights, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loratool.adapter import ModuleKind
from loratool.algebra.blocks import all_finite
from loratool.algebra.factorize import resolve_spectrum
from loratool.algebra.ranks import RankRule, parse_rank_rule
from loratool.algebra.spectrum import Spectrum
from loratool.engine import Engine, Progress
from loratool.errors import NonFiniteValues, UnsupportedInput
from loratool.layouts.config import ModelConfig
from loratool.layouts.experts import by_expert
from loratool.layouts.families import layer_of
from loratool.layouts.kinds import classify
from loratool.ops.deltas import matrix_shape, read_matrix
from loratool.ops.extract_treatments import LOW_RANK_KINDS
from loratool.ops.spectra import SPECTRUM_VALUES, rank_for, ranks_by_share, shape_figures
from loratool.storage.dtypes import FLOATS
from loratool.storage.tensors import LazyTensor, TensorInfo


@dataclass(frozen=True)
class WeightRow:
    """One matrix as it is stored, kernels as (out, in·k…); each expert of a stack is one."""

    name: str
    kind: str
    shape: tuple[int, ...]
    spectrum: Spectrum

    @property
    def spectral_norm(self) -> float:
        """σ₁."""
        return float(self.spectrum.values[0]) if len(self.spectrum.values) else 0.0

    def rank_for(self, share: float) -> int | None:
        """Smallest rank that keeps this share of ‖W‖²; None where it was not resolved."""
        return rank_for(self.spectrum, share)

    def to_json(self) -> dict[str, Any]:
        spectrum = self.spectrum
        return {
            "name": self.name,
            "kind": self.kind,
            "layer": layer_of(self.name),
            "shape": list(self.shape),
            "norm": spectrum.norm,
            "spectral_norm": self.spectral_norm,
            **shape_figures(spectrum, complete=spectrum.is_complete),
            "rank_for": ranks_by_share(spectrum),
            "singular_values": spectrum.values.tolist(),
        }


@dataclass(frozen=True)
class _Job:
    name: str
    kind: ModuleKind
    tensor: LazyTensor
    rule: RankRule
    exact: bool
    device: torch.device

    @property
    def cost(self) -> int:
        rows, columns = matrix_shape(self.tensor.shape)
        return rows * columns * self.tensor.dtype.bits // 8


def weight_spectra(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    *,
    exact: bool,
    device: torch.device,
    engine: Engine,
    progress: Progress,
) -> tuple[WeightRow, ...]:
    """Leading singular values of every weight matrix that holds a value, one at a time.

    exact: all of them. Raises UnsupportedInput for a matrix that is not of plain floats, and
    NonFiniteValues.
    """
    matrices = by_expert(dict(tensors), config)
    kinds = classify({name: tensor.shape for name, tensor in matrices.items()}, config)
    rule = parse_rank_rule("full" if exact else str(SPECTRUM_VALUES))
    jobs = []
    for name, tensor in matrices.items():
        if kinds[name] not in (*LOW_RANK_KINDS, ModuleKind.CONV) or len(tensor.shape) < 2:
            continue
        if 0 in tensor.shape:
            continue
        if tensor.dtype not in FLOATS:
            raise UnsupportedInput(
                f"{name}: is {tensor.dtype.name}; only weights of 16, 32 or 64 bits are measured",
                hint="name the checkpoint that it was quantised from, or leave it out with --only",
            )
        jobs.append(_Job(name, kinds[name], tensor, rule, exact, device))
    return tuple(
        engine.map(
            _resolve, jobs, cost=lambda job: job.cost, progress=progress, what="reading spectra"
        )
    )


def _resolve(job: _Job) -> WeightRow:
    matrix = read_matrix(job.tensor, job.device)
    if not all_finite(matrix):
        raise NonFiniteValues(
            f"{job.name}: holds NaN or infinity", hint="inspect --level values counts them"
        )
    spectrum = resolve_spectrum(matrix, job.rule, key=f"0:{job.name}", exact=job.exact)
    return WeightRow(job.name, str(job.kind), job.tensor.shape, spectrum)
