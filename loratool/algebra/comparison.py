"""Two or more updates of one matrix, measured against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loratool.algebra.lowrank import LowRank, ThinSvd
from loratool.algebra.spectrum import Spectrum
from loratool.algebra.subspaces import joint_dimension, phi_grid, principal_angles


@dataclass(frozen=True)
class PairMeasures:
    """How two updates of one shape compare.

    inner: ⟨ΔW₁, ΔW₂⟩. angles_left, angles_right: principal angles of the column and the row
    spaces, radians, ascending. phi_left, phi_right: φ(i, j) of the leading left and right singular
    vectors (``phi_grid``). first_in_second: ‖P_U₂ ΔW₁ P_V₂‖², the energy of the first that lies in
    the second's column and row space at once; second_in_first likewise.
    """

    inner: float
    first_energy: float
    second_energy: float
    angles_left: Tensor
    angles_right: Tensor
    phi_left: Tensor
    phi_right: Tensor
    first_in_second: float
    second_in_first: float

    @property
    def cosine(self) -> float | None:
        """⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖); None where one is zero."""
        size = self.first_energy**0.5 * self.second_energy**0.5
        return max(-1.0, min(1.0, self.inner / size)) if size else None


def compare_pair(x: ThinSvd, y: ThinSvd) -> PairMeasures:
    """Measure two updates of one shape through their singular vectors."""
    left, right = x.u.T @ y.u, x.v.T @ y.v
    return PairMeasures(
        float(x.values @ (left * right) @ y.values),
        float(x.values.square().sum()),
        float(y.values.square().sum()),
        principal_angles(x.u, y.u),
        principal_angles(x.v, y.v),
        phi_grid(left),
        phi_grid(right),
        _energy(left.T * x.values, right),
        _energy(left * y.values, right.T),
    )


def _energy(left: Tensor, right: Tensor) -> float:
    return float((left @ right).square().sum())


@dataclass(frozen=True)
class JointMeasures:
    """What several updates span together.

    left, right: dimensions of the sum of their column and row spaces. effective_rank: of their
    sum (Roy and Vetterli, 2007). rank_for: the smallest rank that keeps ``share`` of the sum's
    energy.
    """

    left: int
    right: int
    effective_rank: float
    rank_for: int
    share: float


def compare_jointly(
    updates: Sequence[LowRank], svds: Sequence[ThinSvd], share: float
) -> JointMeasures:
    """Measure updates of one shape as a set."""
    total = updates[0]
    for update in updates[1:]:
        total = total + update
    values = total.spectrum().values
    top = sum(float(svd.values[0]) for svd in svds if len(svd.values))
    values = values[values > max(total.shape) * 2.0**-52 * top]  # what cancels is not a direction
    spectrum = Spectrum(values, float(values.square().sum()), total.shape)
    rank = int((spectrum.energy_share() < share).sum()) + 1 if len(values) else 0
    return JointMeasures(
        joint_dimension([svd.u for svd in svds]),
        joint_dimension([svd.v for svd in svds]),
        spectrum.effective_rank(),
        rank,
        share,
    )


def linear_survival(inner: Tensor) -> list[float | None]:
    """⟨Σ_j ΔW_j, ΔW_i⟩/‖ΔW_i‖² from the matrix of inner products: what the sum keeps of each.

    1: untouched by the others; below 1: they cancel part of it; above 1: they repeat part of it.
    """
    return [
        float(inner[i].sum() / inner[i, i]) if inner[i, i] > 0 else None for i in range(len(inner))
    ]
