"""What training, merging and extracting cost, by stated formulas. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratool.algebra.certificate import POWER_STEPS, PROBES
from loratool.algebra.factorize import EXACT_SIDE
from loratool.algebra.krylov import BLOCKS, OVERSAMPLING, STEERING_STEPS, sketch_pays

Shape = tuple[int, int]

WEIGHT_BYTES = 2
GRADIENT_BYTES = 2
ADAM_BYTES = 12
"""Adam in mixed precision keeps a float32 copy of the weight and two float32 moments
(Rajbhandari et al., 2020, ZeRO, §3.1: 2 + 2 + 12 = 16 bytes per trained parameter)."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training run holds, activations and buffers aside."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(parameters: int, trained: int) -> TrainingMemory:
    """Mixed-precision Adam on ``trained`` of ``parameters``; frozen weights are 16-bit."""
    return TrainingMemory(WEIGHT_BYTES * parameters, GRADIENT_BYTES * trained, ADAM_BYTES * trained)


def lora_parameters(shapes: Iterable[Shape], rank: int) -> int:
    """Σ r·(in + out) over the adapted matrices, each rank at most the smaller side.

    LoRA (Hu et al., 2022), §4.2: 2·L·d·r for L square matrices.
    """
    return sum(min(rank, *shape) * sum(shape) for shape in shapes)


def merge_flops(shapes: Iterable[Shape], rank: int) -> int:
    """Multiplications and additions of W0 + B·A: (2·r + 1) for each weight."""
    return sum((2 * min(rank, *shape) + 1) * shape[0] * shape[1] for shape in shapes)


def extract_flops(shapes: Iterable[Shape], rank: int) -> tuple[int, int]:
    """(float32, float64) multiplications and additions of extracting these ranks.

    Of a small matrix, or a rank too high for a sketch: the Gram matrix of the smaller side n ≤ m,
    its eigenvectors (9·n³, Golub and Van Loan, §8.3) and the product that gives the other side. Of
    others: the products of ``algebra.krylov`` with D and Dᵀ, each 2·m·n·c with the sketch's width
    c, and those of the certificate's probes. Then the product of the factors, for the error.
    """
    single = double = 0
    for shape in shapes:
        n, m = sorted(shape)
        kept = min(rank, n)
        double += 2 * m * n * kept
        if n <= EXACT_SIDE or not sketch_pays(kept, n):
            double += m * n**2 + 9 * n**3 + 2 * m * n * kept
            continue
        passes = 1 + 2 * STEERING_STEPS + 2 * BLOCKS
        width = min(kept + OVERSAMPLING, n)
        single += 2 * m * n * (passes * width + 2 * POWER_STEPS[0] * PROBES)
    return single, double


def svd_flops(shapes: Iterable[Shape]) -> int:
    """What full singular value decompositions of the same matrices take, for comparison.

    Golub and Van Loan, 4th edition, figure 8.6.1, R-bidiagonalisation with both factors:
    6·m·n² + 20·n³ for n ≤ m.
    """
    total = 0
    for shape in shapes:
        n, m = sorted(shape)
        total += 6 * m * n**2 + 20 * n**3
    return total
